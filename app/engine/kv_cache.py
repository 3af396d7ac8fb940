"""The KV cache's memory, and the adapter through which any transformers model reads and writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from app.soft_prompt import BaseInfo, SoftPrompt


@dataclass(frozen=True, eq=False)
class BatchSlots:
    """Where a padded batch of rows reads and writes, in slots (block * block_size + offset).

    `read` is [rows, max positions]; behind a row's last position it points to slot 0, which is never written and so
    stays finite (masked positions get weight 0, and 0 * NaN would still poison a row). `write` is [tokens], for the
    tokens at `valid`, flat indices into [rows, max tokens]; `valid` is None when no row is padded.
    """

    read: torch.Tensor
    write: torch.Tensor
    valid: torch.Tensor | None


class KVCache:
    """Keys and values of all blocks: [num_layers, 2, num_blocks * block_size, num_kv_heads, head_dim]."""

    def __init__(
        self, info: BaseInfo, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = block_size
        shape = (info.num_layers, 2, num_blocks * block_size, info.num_kv_heads, info.head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self._blocks = self.data.view(info.num_layers, 2, num_blocks, block_size, -1)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, target)."""
        if pairs:
            sources, targets = zip(*pairs, strict=True)
            self._blocks[:, :, list(targets)] = self._blocks[:, :, list(sources)]

    def slots(self, block_table: list[int], start: int, end: int) -> torch.Tensor:
        """Slots of the positions [start, end), int64 on the CPU."""
        positions = torch.arange(start, end)
        blocks = torch.tensor(block_table)[positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size

    def write_prompt(self, prompt: SoftPrompt, block_table: list[int]) -> None:
        """Store a soft prompt that is keys and values already ([layers, 2, heads, n, head_dim])."""
        slots = self.slots(block_table, 0, prompt.num_virtual_tokens).to(self.data.device)
        self.data[:, :, slots] = prompt.tensor.transpose(2, 3).to(self.data.device, self.data.dtype)

    def is_finite(self, block_table: list[int], num_tokens: int) -> bool:
        """Whether the first `num_tokens` positions are; behind them a block may hold what its last owner left."""
        slots = self.slots(block_table, 0, num_tokens).to(self.data.device)
        return bool(torch.isfinite(self.data[:, :, slots]).all())

    def view(self, batch: BatchSlots) -> Cache:
        """The cache as transformers wants it, for one forward pass over that batch."""
        return Cache(layers=[_PagedLayer(layer[0], layer[1], batch) for layer in self.data.unbind(0)])


class _PagedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values: writes the new tokens into their slots, returns every row's whole past.

    The past comes back padded, [rows, heads, max positions, head_dim], in position order; the caller's mask
    hides the padding.
    """

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, batch: BatchSlots) -> None:
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
