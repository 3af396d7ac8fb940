"""Carries out a step: fills prefixes, copies blocks, runs the model over the rows, and reads its logits."""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

import torch

from app.engine import Logprob
from app.engine.block_manager import Prefix
from app.engine.forward import Forward, Span
from app.engine.host_cache import HostCache
from app.engine.kv_cache import KVCache
from app.engine.sampler import Sampled, SamplingRow, sample, target_logprobs, token_logprobs
from app.engine.scheduler import Row
from app.engine.sequence import ContextSequence, ContinuationSequence, GenerationSequence
from app.engine.upload import upload
from app.errors import InvalidBaseModel, NumericalError
from app.soft_prompt import BaseInfo, SoftPrompt

NOT_FINITE = "the model gave logits that are not finite for this request"
_CHECKED_WINDOW = 512  # positions; to exceed a larger one would take too long at every start


@dataclass(eq=False)
class StepOutput:
    """What a step found, by row; an exception fails that row alone."""

    tokens: dict[Row, Sampled | Exception] = field(default_factory=dict)  # an exception also for a chunk of a prompt
    prompt_logprobs: dict[Row, list[Logprob]] = field(default_factory=dict)
    scores: dict[Row, list[float] | Exception] = field(default_factory=dict)


class ModelRunner:
    """Owns the KV cache's memory and the tier behind it; called by the engine thread only."""

    def __init__(self, forward: Forward, cache: KVCache, host: HostCache) -> None:
        self._forward = forward
        self.cache = cache
        self.host = host

    def has_keys_and_values(self, prompt: SoftPrompt) -> bool:
        """Whether `load` can fill a prefix without the model."""
        return prompt.kind == "kv" or prompt.digest in self.host

    @torch.inference_mode()
    def load(self, prompt: SoftPrompt, prefix: Prefix) -> None:
        """Copy a soft prompt's keys and values into its blocks. Raises NumericalError if they are not finite."""
        found = self.host.get(prompt.digest)
        if found is None:
            found = prompt.tensor.transpose(2, 3).to(self.cache.data.dtype)
            _require_finite(found)
        self.cache.write(found, prefix.block_table)

    @torch.inference_mode()
    def keep(self, prefix: Prefix) -> None:
        """Put a soft prompt that the model has computed into host memory. Raises NumericalError if not finite."""
        computed = self.cache.read(prefix.block_table, prefix.num_tokens)
        _require_finite(computed)
        if prefix.resident:  # else it was unloaded meanwhile
            self.host.put(prefix.key, computed.cpu())

    @torch.inference_mode()
    def run(self, rows: Rows[Row]) -> StepOutput:
        """One forward pass over the rows; nothing but keys and values changes, so it can be tried again."""
        output = StepOutput()
        if not rows:
            return output
        spans = [
            Span(
                row.sequence.block_table,
                row.start,
                row.end,
                row.sequence.inputs(row.start, row.end),
                row.num_logits,
            )
            for row in rows
        ]
        logits = self._forward(spans)
        drawing: list[tuple[int, Row]] = []  # where in `logits`
        scoring: list[tuple[int, Row]] = []  # likewise, its first position
        end = 0
        for row, span in zip(rows, spans, strict=True):
            start, end = end, end + span.num_logits
            if start == end:
                continue
            sequence = row.sequence
            if not isinstance(sequence, GenerationSequence):
                scoring.append((start, row))
                continue
            num_top = sequence.params.prompt_logprobs
            if num_top is not None and (targets := sequence.prompt_targets(row.start, row.end)):
                predicting = logits[start : start + len(targets)]
                try:
                    output.prompt_logprobs[row] = token_logprobs(predicting, targets, num_top)
                except NumericalError as error:
                    output.tokens[row] = error
                    continue
            if row.end == sequence.num_tokens:
                drawing.append((end - 1, row))
        self._draw(logits, drawing, output)
        if scoring:
            output.scores = _score(logits, scoring)
        return output

    @staticmethod
    def _draw(logits: torch.Tensor, drawing: list[tuple[int, Row]], output: StepOutput) -> None:
        if not drawing:
            return
        positions = [position for position, _ in drawing]
        if positions != list(range(len(logits))):  # else every row draws, as in a plain decoding step
            logits = logits[upload(torch.tensor(positions), logits.device)]
        found = sample(logits, [_sampling_row(row.sequence) for _, row in drawing])
        output.tokens.update(zip((row for _, row in drawing), found, strict=True))


def _sampling_row(sequence: Any) -> SamplingRow:
    draw = sequence.draw if sequence.params.temperature > 0 else 0.0
    return SamplingRow(sequence.params, draw, sequence.token_ids, sequence.num_prompt_tokens, sequence.constraint)


def _score(logits: torch.Tensor, scoring: Rows[tuple[int, Row]]) -> dict[Row, list[float] | Exception]:
    """Log-probabilities, in nats, of the tokens that scoring rows' positions predict; all rows at once."""
    positions: list[int] = []
    targets: list[int] = []
    ends: list[int] = []  # of each row's share
    for start, row in scoring:
        sequence = row.sequence
        if isinstance(sequence, ContinuationSequence):
            own = sequence.targets(row.start, row.end)
            positions += range(start, start + len(own))
        else:
            assert isinstance(sequence, ContextSequence)
            own = [tokens[0] for tokens in sequence.score.continuations]
            positions += [start] * len(own)
        targets += own
        ends.append(len(targets))
    found = target_logprobs(logits, positions, targets)
    scores: dict[Row, list[float] | Exception] = {}
    for (_, row), begin, end in zip(scoring, [0, *ends], ends, strict=False):
        own_found = found[begin:end]
        scores[row] = NumericalError(NOT_FINITE) if any(map(math.isnan, own_found)) else own_found
    return scores


def _require_finite(keys_and_values: torch.Tensor) -> None:
    if not bool(torch.isfinite(keys_and_values).all()):
        raise NumericalError(f"the soft prompt's keys and values are not finite in {keys_and_values.dtype}")


def self_check_blocks(model: Any, info: BaseInfo, block_size: int) -> int:
    """How many blocks `self_check` wants: past the end of a block and of a small sliding window. It does with 2."""
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    length = (window if window <= _CHECKED_WINDOW else 0) + block_size + 4
    return 1 + -(-min(length, info.max_model_len) // block_size)


@torch.inference_mode()
def self_check(
    forward: Forward, model: Any, info: BaseInfo, blocks: list[int], block_size: int, *, tolerance: float
) -> None:
    """Compare chunked, mixed, out-of-order batches with the model's plain forward, on `blocks` (scratch).

    Models that ignore our masks or positions (ALiBi, recurrent states) would give wrong tokens in silence; this finds
    them at start. The last two batches decode, as CUDA graphs where there are any: one captures, one replays.
    `tolerance` is relative to the largest logit. Raises InvalidBaseModel.
    """
    table, other = blocks[:-1], blocks[-1:]
    end = min(len(table) * block_size, info.max_model_len)
    ids = [i * 37 % info.vocab_size for i in range(1, end + 1)]
    short = [i * 41 % info.vocab_size for i in range(2, 6)]
    half, last = (end - 2) // 2, end - 2

    def plain(text: list[int], count: int) -> torch.Tensor:
        """Logits of the last `count` positions."""
        tokens = torch.tensor([text], device=model.device)
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=count).logits[0, -count:]
        return logits.float()

    try:
        embeddings = model.get_input_embeddings()(torch.tensor(short[:2], device=model.device))
        wanted, shorter = plain(ids, 3), plain(short, 3)
        forward([Span(table, 0, half, ids[:half], 1)])
        batches = (
            [Span(other, 0, 2, embeddings, 1), Span(table, half, last, ids[half:last], 1)],
            [Span(table, last, last + 1, ids[last : last + 1], 1), Span(other, 2, 3, short[2:3], 1)],
            [Span(other, 3, 4, short[3:], 1), Span(table, last + 1, end, ids[last + 1 :], 1)],
        )
        found = [forward(batch).to(model.device) for batch in batches]
        expected = (
            torch.stack([shorter[0], wanted[0]]),
            torch.stack([wanted[1], shorter[1]]),
            torch.stack([shorter[2], wanted[2]]),
        )
        errors = [
            float(((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max())
            for ours, theirs in zip(found, expected, strict=True)
        ]
    except Exception as cause:
        raise InvalidBaseModel(f"{info.architecture} cannot be served: its forward failed: {cause}") from cause
    if not all(error < tolerance for error in errors):
        raise InvalidBaseModel(
            f"{info.architecture} cannot be served in mixed batches: its logits differ by a factor of "
            f"{', '.join(f'{error:.3g}' for error in errors)} from its own forward (limit {tolerance:.3g}); it needs "
            "causal attention that honours attention masks and position ids"
        )
