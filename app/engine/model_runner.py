"""Runs the frozen model over the rows of a step: any transformers causal LM, through its own forward.

Rows are padded on the left to the longest of their group, so that the last position of every row stands in the same
column and the model computes logits only there. Masks and positions come from real lengths, so padding never shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from app.engine.block_manager import Prefix
from app.engine.kv_cache import BatchSlots, KVCache
from app.engine.sampler import sample
from app.engine.scheduler import Row, Step
from app.engine.sequence import ContextSequence, ContinuationSequence, GenerationSequence
from app.errors import InvalidBaseModel, NumericalError
from app.soft_prompt import BaseInfo, SoftPrompt

SELF_CHECK_TOLERANCE = 5e-2  # relative to the largest logit, so that low precision passes and wrong masks do not


@dataclass(eq=False)
class StepOutput:
    """What a step found, by row. None stands for logits that are not finite."""

    tokens: dict[Row, int | None] = field(default_factory=dict)
    logprobs: dict[Row, list[float] | None] = field(default_factory=dict)
    failed_prefixes: dict[Prefix, Exception] = field(default_factory=dict)


class ModelRunner:
    """Owns the model and the KV cache's memory; called by the engine thread only."""

    def __init__(self, model: Any, info: BaseInfo, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self.device = cache.data.device
        self.dtype = cache.data.dtype
        self._info = info
        config = model.config.get_text_config()
        layer_types = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        if layer_types is None:
            layer_types = ["sliding_attention" if window else "full_attention"] * info.num_layers
        self._layer_types = sorted(set(layer_types))
        self._window = int(window or 0)  # 0: no layer slides

    @torch.inference_mode()
    def run(self, step: Step) -> StepOutput:
        """Carry out a step. A prefix that cannot be loaded fails alone; its rows are left out."""
        output = StepOutput()
        for prompt, prefix in step.loads:
            try:
                self.load(prompt, prefix)
            except Exception as error:
                output.failed_prefixes[prefix] = error
        self.cache.copy(step.copies)
        rows = [row for row in step.rows if row.sequence.prefix not in output.failed_prefixes]
        for group in _groups(rows):
            self._run_group(group, output)
        return output

    def load(self, prompt: SoftPrompt, prefix: Prefix) -> None:
        """Fill a prefix's blocks: copy keys and values, or compute them from the embeddings, once.

        Raises NumericalError if they are not finite in the model's dtype.
        """
        if prompt.kind == "kv":
            self.cache.write_prompt(prompt, prefix.block_table)
        else:
            embeddings = prompt.tensor.to(self.device, self.dtype).unsqueeze(0)
            spans = [(prefix.block_table, 0, prompt.num_virtual_tokens)]
            self._forward(spans, num_logits=1, inputs_embeds=embeddings)
        if not self.cache.is_finite(prefix.block_table, prefix.num_tokens):
            raise NumericalError(f"the soft prompt's keys and values are not finite in {self.dtype}")

    @torch.inference_mode()
    def probe(self, prefix: Prefix, block: int) -> bool:
        """Whether one token behind the prefix gives finite logits. `block` is scratch memory."""
        num_full = prefix.num_tokens // self.cache.block_size
        self.cache.copy([(source, block) for source in prefix.block_table[num_full:]])
        table = [*prefix.block_table[:num_full], block]
        spans = [(table, prefix.num_tokens, prefix.num_tokens + 1)]
        logits = self._forward(spans, num_logits=1, input_ids=torch.zeros(1, 1, dtype=torch.int64))
        return bool(torch.isfinite(logits).all())

    def _run_group(self, rows: list[Row], output: StepOutput) -> None:
        width = max(row.num_tokens for row in rows)
        input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            offset = row.sequence.num_virtual_tokens
            tokens = row.sequence.token_ids[row.start - offset : row.end - offset]
            input_ids[i, width - row.num_tokens :] = torch.tensor(tokens)
        num_logits = max(row.num_logits for row in rows)
        spans = [(row.sequence.block_table, row.start, row.end) for row in rows]
        # Logits of at least one position: 0 would mean all of them to transformers.
        logits = self._forward(spans, num_logits=max(num_logits, 1), input_ids=input_ids)

        drawing: list[tuple[int, Row, GenerationSequence]] = []
        for i, row in enumerate(rows):
            if row.num_logits == 0:
                continue
            if isinstance(row.sequence, GenerationSequence):
                drawing.append((i, row, row.sequence))
            else:
                output.logprobs[row] = _score(logits[i, -row.num_logits :], row)
        if drawing:
            chosen = sample(
                logits[[i for i, _, _ in drawing], -1],
                [sequence.params for _, _, sequence in drawing],
                [sequence.random.random() for _, _, sequence in drawing],
            )
            output.tokens.update(zip((row for _, row, _ in drawing), chosen, strict=True))

    def _forward(
        self, spans: list[tuple[list[int], int, int]], *, num_logits: int, **inputs: torch.Tensor
    ) -> torch.Tensor:
        """Logits [rows, num_logits, vocab_size] of the last positions of (block table, start, end) spans.

        `inputs` is `input_ids` [rows, width] or `inputs_embeds` [rows, width, hidden_size], padded on the left.
        """
        width = max(end - start for _, start, end in spans)
        length = max(end for _, _, end in spans)
        read = torch.zeros(len(spans), length, dtype=torch.int64)
        positions = torch.zeros(len(spans), width, dtype=torch.int64)
        padding = torch.ones(len(spans), width, dtype=torch.bool)
        write = []
        for i, (table, start, end) in enumerate(spans):
            read[i, :end] = self.cache.slots(table, 0, end)
            positions[i, width - (end - start) :] = torch.arange(start, end)
            padding[i, width - (end - start) :] = False
            write.append(read[i, start:end])
        valid = (~padding).flatten().nonzero().squeeze(-1).to(self.device) if padding.any() else None
        batch = BatchSlots(read.to(self.device), torch.cat(write).to(self.device), valid)
        out = self.model(
            **{name: tensor.to(self.device) for name, tensor in inputs.items()},
            attention_mask=self._masks(positions.to(self.device), length),
            position_ids=positions.to(self.device),
            past_key_values=self.cache.view(batch),
            use_cache=True,
            logits_to_keep=num_logits,
        )
        logits: torch.Tensor = out.logits
        return logits

    def _masks(self, positions: torch.Tensor, length: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive masks [rows, 1, width, length]: causal, and within the window for sliding layers.

        The smallest finite number, not minus infinity: in a sliding layer a padded query may see nothing at all, and
        must stay finite.
        """
        keys = torch.arange(length, device=self.device)
        distance = positions.unsqueeze(-1) - keys  # [rows, width, length]
        low = torch.finfo(self.dtype).min
        masks = {}
        for layer_type in self._layer_types:
            hidden = distance < 0
            if layer_type == "sliding_attention":
                hidden = hidden | (distance >= self._window)
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
            masks[layer_type] = mask.masked_fill_(hidden, low).unsqueeze(1)
        return masks if len(masks) > 1 else masks.popitem()[1]

    @torch.inference_mode()
    def self_check(self, blocks: list[int]) -> None:
        """Compare a padded, chunked, out-of-order batch with the model's plain forward, on `blocks` (scratch).

        Models that ignore our masks or positions (ALiBi, recurrent states) would give wrong tokens in silence;
        this finds them at start. Raises InvalidBaseModel.
        """
        try:
            error = self._self_check_error(blocks)
        except Exception as cause:
            raise InvalidBaseModel(
                f"{self._info.architecture} cannot be served: its forward failed: {cause}"
            ) from cause
        if not error < SELF_CHECK_TOLERANCE:
            raise InvalidBaseModel(
                f"{self._info.architecture} cannot be served in mixed batches: its logits differ by a factor of "
                f"{error:.3g} from its own forward (limit {SELF_CHECK_TOLERANCE}); it needs causal attention that "
                "honours attention masks and position ids"
            )

    def _self_check_error(self, blocks: list[int]) -> float:
        size = self.cache.block_size
        ids = torch.arange(1, 8) * 37 % self._info.vocab_size
        plain = self.model(input_ids=ids[None].to(self.device), use_cache=False).logits[0, -1].float()
        table = blocks[: -(-len(ids) // size)]
        other = blocks[len(table) :]
        self._forward([(table, 0, 3)], num_logits=1, input_ids=ids[None, :3])
        batch = torch.stack([torch.cat([ids[:3] * 0, ids[:1]]), ids[3:]])
        ours = self._forward([(other, 0, 1), (table, 3, len(ids))], num_logits=1, input_ids=batch)[1, -1].float()
        return float((ours - plain).abs().max() / plain.abs().max())


def _groups(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows of similar length together, so that padding at most doubles the work; single tokens in one group."""
    group: list[Row] = []
    for row in sorted(rows, key=lambda row: row.num_tokens, reverse=True):
        if group and group[0].num_tokens > max(2 * row.num_tokens, 1):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _score(logits: torch.Tensor, row: Row) -> list[float] | None:
    """Log-probabilities, in nats, of the tokens that a scoring row's positions predict."""
    sequence = row.sequence
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    if isinstance(sequence, ContinuationSequence):
        targets = torch.tensor(sequence.targets(row.start, row.end), device=logits.device)
        found = logprobs.gather(-1, targets[:, None]).squeeze(-1)
    else:
        assert isinstance(sequence, ContextSequence)
        first = torch.tensor([tokens[0] for tokens in sequence.score.continuations], device=logits.device)
        found = logprobs[-1, first]
    return found.tolist() if bool(torch.isfinite(logits).all()) else None
