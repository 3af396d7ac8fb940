"""Any transformers causal LM, through its own forward: slower than a fused decoder and equally right.

Rows are padded on the left to the longest of their group, so that the last position of every row stands in the same
column and the model computes logits only there. Masks and positions come from real lengths, so padding never shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from app.engine.forward import Span
from app.engine.kv_cache import KVCache


class TransformersForward:
    """Implements `app.engine.forward.Forward`."""

    def __init__(self, model: Any, cache: KVCache) -> None:
        self._model = model
        self._cache = cache
        self._device = cache.data.device
        self._dtype = cache.data.dtype
        config = model.config.get_text_config()
        layer_types = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        if layer_types is None:
            layer_types = ["sliding_attention" if window else "full_attention"]
        self._layer_types = sorted(set(layer_types))
        self._window = int(window or 0)  # 0: no layer slides

    @property
    def describe(self) -> str:
        """See `Forward`."""
        return f"{type(self._model).__name__} through transformers on {self._device}"

    @torch.inference_mode()
    def __call__(self, spans: Sequence[Span]) -> torch.Tensor:
        """See `Forward`."""
        logits: dict[Span, torch.Tensor] = {}
        for group in _groups(spans):
            found = self._forward(group)
            logits |= {span: rows[len(rows) - span.num_logits :] for span, rows in zip(group, found, strict=True)}
        return torch.cat([logits[span] for span in spans]).float()

    def _forward(self, spans: list[Span]) -> torch.Tensor:
        """Logits [rows, at least the largest num_logits, vocab_size] of the last positions of each span."""
        width = max(span.num_tokens for span in spans)
        length = max(span.end for span in spans)
        read = torch.zeros(len(spans), length, dtype=torch.int64)
        positions = torch.zeros(len(spans), width, dtype=torch.int64)
        padding = torch.ones(len(spans), width, dtype=torch.bool)
        write = []
        for i, span in enumerate(spans):
            read[i, : span.end] = self._cache.slots(span.block_table, 0, span.end)
            positions[i, width - span.num_tokens :] = torch.arange(span.start, span.end)
            padding[i, width - span.num_tokens :] = False
            write.append(read[i, span.start : span.end])
        valid = (~padding).flatten().nonzero().squeeze(-1).to(self._device) if padding.any() else None
        batch = _Slots(read.to(self._device), torch.cat(write).to(self._device), valid)
        out = self._model(
            **self._inputs(spans, width),
            attention_mask=self._masks(positions.to(self._device), length),
            position_ids=positions.to(self._device),
            past_key_values=Cache(layers=[_PagedLayer(keys, values, batch) for keys, values in self._cache.data]),
            use_cache=True,
            # Logits of at least one position: 0 would mean all of them to transformers.
            logits_to_keep=max(1, *(span.num_logits for span in spans)),
        )
        logits: torch.Tensor = out.logits
        return logits

    def _inputs(self, spans: list[Span], width: int) -> dict[str, torch.Tensor]:
        if _has_embeddings(spans[0]):
            assert isinstance(spans[0].inputs, torch.Tensor)
            shape = (len(spans), width, spans[0].inputs.shape[-1])
            embeddings = torch.zeros(shape, dtype=self._dtype, device=self._device)
            for row, span in zip(embeddings, spans, strict=True):
                assert isinstance(span.inputs, torch.Tensor)
                row[width - span.num_tokens :] = span.inputs.to(self._device, self._dtype)
            return {"inputs_embeds": embeddings}
        ids = torch.zeros(len(spans), width, dtype=torch.int64)
        for row, span in zip(ids, spans, strict=True):
            row[width - span.num_tokens :] = torch.as_tensor(span.inputs)
        return {"input_ids": ids.to(self._device)}

    def _masks(self, positions: torch.Tensor, length: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive masks [rows, 1, width, length]: causal, and within the window for sliding layers.

        The smallest finite number, not minus infinity: in a sliding layer a padded query may see nothing at all, and
        must stay finite.
        """
        keys = torch.arange(length, device=self._device)
        distance = positions.unsqueeze(-1) - keys  # [rows, width, length]
        low = torch.finfo(self._dtype).min
        masks = {}
        for layer_type in self._layer_types:
            hidden = distance < 0
            if layer_type == "sliding_attention":
                hidden = hidden | (distance >= self._window)
            mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
            masks[layer_type] = mask.masked_fill_(hidden, low).unsqueeze(1)
        return masks if len(masks) > 1 else masks.popitem()[1]


def _groups(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Spans of similar length together, so that padding at most doubles the work; single tokens in one group."""
    group: list[Span] = []
    for span in sorted(spans, key=lambda span: (_has_embeddings(span), span.num_tokens), reverse=True):
        if group:
            same_kind = _has_embeddings(span) == _has_embeddings(group[0])
            if not same_kind or group[0].num_tokens > max(2 * span.num_tokens, 1):
                yield group
                group = []
        group.append(span)
    if group:
        yield group


def _has_embeddings(span: Span) -> bool:
    return isinstance(span.inputs, torch.Tensor)


@dataclass(frozen=True, eq=False)
class _Slots:
    """Where a padded batch of rows reads and writes, in slots (block * block_size + offset).

    `read` is [rows, max positions]; behind a row's last position it points to slot 0, which is never written and so
    stays finite (masked positions get weight 0, and 0 * NaN would still poison a row). `write` is [tokens], for the
    tokens at `valid`, flat indices into [rows, max tokens]; `valid` is None when no row is padded.
    """

    read: torch.Tensor
    write: torch.Tensor
    valid: torch.Tensor | None


class _PagedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values: writes the new tokens into their slots, returns every row's whole past.

    The past comes back padded, [rows, heads, max positions, head_dim], in position order; the caller's mask
    hides the padding.
    """

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, batch: _Slots) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values  # [slots, heads, head_dim]
        self.is_initialized = True
        self._batch = batch

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        return self._update(self.keys, key_states), self._update(self.values, value_states)

    def _update(self, memory: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        new = states.transpose(1, 2).flatten(0, 1)  # [rows * max tokens, heads, head_dim]
        if self._batch.valid is not None:
            new = new[self._batch.valid]
        memory.index_copy_(0, self._batch.write, new)
        rows, length = self._batch.read.shape
        past = memory.index_select(0, self._batch.read.flatten())
        return past.view(rows, length, *memory.shape[1:]).transpose(1, 2)

    def get_seq_length(self) -> int:
        return int(self._batch.read.shape[1])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self._batch.read.shape[1]), 0
