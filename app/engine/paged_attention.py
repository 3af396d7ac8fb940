"""Attention of ragged rows over keys and values in blocks: what every implementation is, and the one for any device.

All of them are causal with the last query of a row at the row's last key, and read nothing behind it: what a block
holds there may be another row's, or not a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Geometry:
    """What an implementation must know before the first batch."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    max_blocks: int  # of one row
    scale: float
    windows: tuple[int, ...]  # every window that some layer has; 0: none
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, eq=False)
class PagedBatch:
    """Rows of one pass, on the host and on the device. Row r asks at its last query_lens[r] positions.

    `static`: the device tensors are buffers that a captured graph reads, refilled before each replay; every row has
    one query. The lists are those of the rows that are in the buffers now.
    """

    query_lens: Sequence[int]
    key_lens: Sequence[int]
    tables: Sequence[Sequence[int]]
    cu_queries: torch.Tensor  # int32 [rows + 1]: where each row's queries start, and how many there are
    cu_keys: torch.Tensor  # int32 [rows + 1]: the same for keys
    num_keys: torch.Tensor  # int32 [rows]
    block_tables: torch.Tensor  # int32 [rows, width]; anything in range behind a row's last block
    max_queries: int
    max_keys: int
    static: bool = False


class PagedAttention(Protocol):
    name: str
    graphs: bool  # whether decoding with it is worth a CUDA graph

    def plan(self, batch: PagedBatch) -> None:
        """Host work for one pass, before its first layer; never inside a graph."""
        ...

    def __call__(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, window: int
    ) -> torch.Tensor:
        """q [queries, num_heads, head_dim] over [blocks, block_size, num_kv_heads, head_dim]; q's shape."""
        ...


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows of the same number of queries, attended together."""

    queries: torch.Tensor | None  # [rows * width] into the batch's; None: all of them, in order
    rows: int
    slots: torch.Tensor  # [rows, keys]; behind a row's end its last key again, so that nothing foreign is read
    distance: torch.Tensor  # [rows, width, keys]: from query back to key; negative is hidden


class ReferenceAttention:
    """Gather and torch's scaled dot product: any device, any dtype."""

    name = "reference"
    graphs = False

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._groups: list[_Group] = []
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    def plan(self, batch: PagedBatch) -> None:
        self._masks.clear()
        self._groups.clear()
        if batch.static:
            return
        starts = torch.tensor([0, *batch.query_lens]).cumsum(0).tolist()
        single: list[int] = []
        for row in sorted(range(len(batch.key_lens)), key=lambda row: batch.key_lens[row], reverse=True):
            if batch.query_lens[row] > 1:
                self._groups.append(self._group(batch, [row], starts))
                continue
            # Padding at most doubles the work.
            if single and batch.key_lens[single[0]] > 2 * batch.key_lens[row]:
                self._groups.append(self._group(batch, single, starts))
                single = []
            single.append(row)
        if single:
            self._groups.append(self._group(batch, single, starts))

    def _group(self, batch: PagedBatch, rows: list[int], starts: list[int]) -> _Group:
        device, width = batch.num_keys.device, batch.query_lens[rows[0]]
        index = torch.tensor(rows, device=device)
        queries = torch.tensor([starts[row] + i for row in rows for i in range(width)], device=device)
        length = max(batch.key_lens[row] for row in rows)
        return self._lay_out(batch.block_tables[index], batch.num_keys[index], length, width, queries)

    def _lay_out(
        self, tables: torch.Tensor, num_keys: torch.Tensor, length: int, width: int, queries: torch.Tensor | None
    ) -> _Group:
        size, ends = self._geometry.block_size, num_keys.long()[:, None]
        keys = torch.arange(length, device=ends.device)
        read = torch.minimum(keys, ends - 1)  # [rows, length]
        slots = tables.long().gather(1, read // size) * size + read % size
        asked = ends - width + torch.arange(width, device=ends.device)  # [rows, width]
        return _Group(queries, len(tables), slots, asked[:, :, None] - keys)

    def __call__(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, window: int
    ) -> torch.Tensor:
        if batch.static:
            length = batch.block_tables.shape[1] * self._geometry.block_size
            group = self._lay_out(batch.block_tables, batch.num_keys, length, 1, None)
            return self._attend(q, keys, values, group, self._mask(group, window))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for i, group in enumerate(self._groups):
            if (i, window) not in self._masks:
                self._masks[i, window] = self._mask(group, window)
            assert group.queries is not None
            found = self._attend(q[group.queries], keys, values, group, self._masks[i, window])
            out.index_copy_(0, group.queries, found)
        return out

    def _mask(self, group: _Group, window: int) -> torch.Tensor:
        """[rows, 1, queries, keys] as `_attend` lays out its queries."""
        seen = group.distance >= 0
        if window:
            seen &= group.distance < window
        repeat = self._geometry.num_heads // self._geometry.num_kv_heads
        return (seen if seen.shape[1] == 1 else seen.repeat_interleave(repeat, dim=1)).unsqueeze(1)

    def _attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: _Group, mask: torch.Tensor
    ) -> torch.Tensor:
        """The query heads of one key head stand beside each other as if they were positions: no key is repeated."""
        g, rows = self._geometry, group.rows
        shape = (rows, -1, g.num_kv_heads, g.num_heads // g.num_kv_heads, g.head_dim)
        q = q.reshape(shape).transpose(1, 2)  # [rows, kv heads, width, heads of each, head_dim]
        width = q.shape[2]
        k, v = (x.flatten(0, 1)[group.slots].transpose(1, 2) for x in (keys, values))  # [rows, kv heads, keys, dim]
        out = functional.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=mask, scale=g.scale)
        out = out.view(rows, g.num_kv_heads, width, -1, g.head_dim).transpose(1, 2)
        return out.reshape(rows * width, g.num_heads, g.head_dim)


def paged_batch(
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    tables: Sequence[Sequence[int]],
    device: torch.device,
    *,
    static: bool = False,
) -> PagedBatch:
    """A batch whose tensors come from the lists, one copy each."""
    width = max(map(len, tables))
    padded = torch.tensor([[*table, *[0] * (width - len(table))] for table in tables], dtype=torch.int32)
    return PagedBatch(
        query_lens=query_lens,
        key_lens=key_lens,
        tables=tables,
        cu_queries=torch.tensor([0, *query_lens]).cumsum(0, dtype=torch.int32).to(device),
        cu_keys=torch.tensor([0, *key_lens]).cumsum(0, dtype=torch.int32).to(device),
        num_keys=torch.tensor(key_lens, dtype=torch.int32, device=device),
        block_tables=padded.to(device),
        max_queries=max(query_lens),
        max_keys=max(key_lens),
        static=static,
    )
