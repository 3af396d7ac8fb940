"""Carries out a step: fills prefixes, copies blocks, runs the model over the rows, and reads its logits."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

import torch

from app.engine import Logprob
from app.engine.block_manager import Prefix
from app.engine.forward import Forward, Span
from app.engine.host_cache import HostCache
from app.engine.kv_cache import KVCache
from app.engine.sampler import Sampled, SamplingRow, sample, token_logprobs
from app.engine.scheduler import Row
from app.engine.sequence import ContextSequence, ContinuationSequence, GenerationSequence
from app.errors import InvalidBaseModel, NumericalError
from app.soft_prompt import BaseInfo, SoftPrompt

NOT_FINITE = "the model gave logits that are not finite for this request"


@dataclass(eq=False)
class StepOutput:
    """What a step found, by row; an exception fails that row alone."""

    tokens: dict[Row, Sampled | Exception] = field(default_factory=dict)
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
        scoring: list[tuple[int, Row]] = []
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
                output.prompt_logprobs[row] = token_logprobs(predicting, targets, num_top)
            if row.end == sequence.num_tokens:
                drawing.append((end - 1, row))
        self._draw(logits, drawing, output)
        for start, row in scoring:
            output.scores[row] = _score(logits[start : start + row.num_logits], row)
        return output

    @staticmethod
    def _draw(logits: torch.Tensor, drawing: list[tuple[int, Row]], output: StepOutput) -> None:
        if not drawing:
            return
        positions = [position for position, _ in drawing]
        if positions != list(range(len(logits))):  # else every row draws, as in a plain decoding step
            logits = logits[torch.tensor(positions, device=logits.device)]
        found = sample(logits, [_sampling_row(row.sequence) for _, row in drawing])
        output.tokens.update(zip((row for _, row in drawing), found, strict=True))


def _sampling_row(sequence: Any) -> SamplingRow:
    params = sequence.params
    draw = sequence.draw if params.temperature > 0 else 0.0
    # The texts are copied only for those who look at them: in most steps that is nobody.
    prompt = sequence.token_ids[: sequence.num_prompt_tokens] if params.repetition_penalty != 1 else ()
    looks_back = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
    output = sequence.output_token_ids if looks_back or params.min_tokens else ()
    return SamplingRow(params, draw, prompt, output, sequence.constraint)


def _score(logits: torch.Tensor, row: Row) -> list[float] | Exception:
    """Log-probabilities, in nats, of the tokens that a scoring row's positions predict."""
    sequence = row.sequence
    if isinstance(sequence, ContinuationSequence):
        index = torch.tensor(sequence.targets(row.start, row.end), device=logits.device)[:, None]
    else:
        assert isinstance(sequence, ContextSequence)
        index = torch.tensor([[tokens[0] for tokens in sequence.score.continuations]], device=logits.device)
    total = logits.logsumexp(dim=-1, keepdim=True)
    found = (logits.gather(-1, index) - total).flatten()
    # NaN anywhere in a position's logits makes its total NaN, infinity makes it infinite.
    if not bool(torch.isfinite(total).all()):
        return NumericalError(NOT_FINITE)
    logprobs: list[float] = found.tolist()
    return logprobs


def _require_finite(keys_and_values: torch.Tensor) -> None:
    if not bool(torch.isfinite(keys_and_values).all()):
        raise NumericalError(f"the soft prompt's keys and values are not finite in {keys_and_values.dtype}")


@torch.inference_mode()
def self_check(forward: Forward, model: Any, info: BaseInfo, blocks: list[int], *, tolerance: float) -> None:
    """Compare a chunked, mixed, out-of-order batch with the model's plain forward, on `blocks` (scratch).

    Models that ignore our masks or positions (ALiBi, recurrent states) would give wrong tokens in silence; this finds
    them at start. `tolerance` is relative to the largest logit. Raises InvalidBaseModel.
    """
    ids = [i * 37 % info.vocab_size for i in range(1, 8)]
    try:
        plain = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()
        forward([Span(blocks[:1], 0, 3, ids[:3], 1)])
        mixed = forward([Span(blocks[1:2], 0, 1, ids[:1], 1), Span(blocks[:1], 3, len(ids), ids[3:], 1)])
        error = float((mixed[1].to(plain.device) - plain).abs().max() / plain.abs().max())
    except Exception as cause:
        raise InvalidBaseModel(f"{info.architecture} cannot be served: its forward failed: {cause}") from cause
    if not error < tolerance:
        raise InvalidBaseModel(
            f"{info.architecture} cannot be served in mixed batches: its logits differ by a factor of "
            f"{error:.3g} from its own forward (limit {tolerance}); it needs causal attention that "
            "honours attention masks and position ids"
        )
