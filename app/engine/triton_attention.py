"""Attention over blocks by kernels of our own in Triton, which comes with every CUDA build of torch.

One kernel serves any mix of rows. As in FlashAttention-2 (Dao, arXiv:2307.08691) a program holds a tile of queries and
walks over their keys with a running softmax in float32; the query heads that share a key head are lines of one tile,
so that keys are read once for all of them. As in Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023) the keys of a tile
may be cut into parts for several programs, whose results a second kernel merges: a long row alone would else leave
most of the device idle.

Which tiles are cut, and how often, is decided on the host, which knows every length: a list of work that the kernels
read from the device. Graphs have room for a fixed amount of it, and every replay brings its own.
"""

from __future__ import annotations

import importlib
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from app.engine.attention_check import Unavailable
from app.engine.attention_kernels import KERNEL_DTYPES, require_card
from app.engine.cuda_graphs import upload_ints
from app.engine.paged_attention import Geometry, PagedBatch

LEAST_PART = 256  # keys; a smaller part would cost more to merge than it saves
MOST_HEADS = 64  # that share a key head
_ITEM, _MERGE = 5, 4  # ints of each in the list of work, as the kernels know
_MERGED_AT_A_TIME = 16
_PROGRAMS_PER_PROCESSOR = 2


@dataclass(frozen=True)
class Tiling:
    """How much of a batch one program holds. `tl.dot` wants no side below 16."""

    lines: int  # queries times the heads of one key head
    keys: int  # in one turn of the loop
    warps: int
    stages: int  # turns whose keys and values are in shared memory or on their way to it


def tilings(dtype: torch.dtype, head_dim: int, group: int) -> tuple[Tiling, Tiling]:
    """For batches of one query a row, and for any other. Fixed, because nothing can be tried out inside a graph.

    `head_dim` and `group` (heads that share a key head) are powers of two. Shared memory stays within 99 KiB, what
    every card from compute capability 8.0 on has, for groups of up to 16.
    """
    small, size = dtype.itemsize == 2, dtype.itemsize * head_dim  # size: bytes of a key
    keys = 64 if small and size <= 256 else 32 if size <= 512 else 16
    single = max(16, group)
    ragged = max(64 if small else 32 if size <= 512 else 16, group)
    return Tiling(single, keys, 4, 3 if size <= 256 else 2), Tiling(ragged, keys, 4, 2)


def _load_kernels(geometry: Geometry) -> Any:
    require_card(geometry, (8, 0))
    try:
        return importlib.import_module("app.engine.triton_kernels")
    except ImportError as error:
        raise Unavailable("triton is not installed") from error


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@dataclass(frozen=True, eq=False)
class _Plan:
    """The work of one batch. `work` holds ints of

    - items (row, its first query in the tile, part, number of parts, slot for the result if there are several), then
    - merges (row, its first query in the tile, number of parts, slot of the first part).

    A row of -1 stands for nothing to do.
    """

    work: torch.Tensor  # int32
    items: int
    merges: int
    tiling: Tiling
    lines: int  # of a tile, those that can have a query


class TritonAttention:
    """float16, bfloat16 and float32, heads of any multiple of 16 up to 256, blocks of any size.

    Rows of not-a-number stay in their row, and nothing behind a row's end is read. Raises Unavailable.
    """

    graphs = True
    name = "triton"

    def __init__(self, geometry: Geometry) -> None:
        g = geometry
        self._group = g.num_heads // g.num_kv_heads
        if g.dtype not in (*KERNEL_DTYPES, torch.float32) or g.head_dim % 16 or g.head_dim > 256:
            raise Unavailable(f"no kernel for {g.dtype} and heads of {g.head_dim}")
        if self._group > MOST_HEADS:
            raise Unavailable(f"no kernel for {self._group} heads that share a key head")
        self._kernels = _load_kernels(g)
        self._geometry = g
        self._group_pad, self._dim_pad = (1 << (n - 1).bit_length() for n in (self._group, g.head_dim))
        self._single, self._ragged = tilings(g.dtype, self._dim_pad, self._group_pad)
        # Items beyond one a tile: so many that a single row's programs fill the device. None if no row gets that long.
        self._spare = 0
        if g.max_blocks * g.block_size >= 2 * LEAST_PART:
            self._spare = max(1, _PROGRAMS_PER_PROCESSOR * _processors(g.device) // g.num_kv_heads - 1)
        self._reach = max(g.windows) if all(g.windows) else None  # keys that a query sees at most
        # A tile cut into n parts has n - 1 of the spare items. One memory for all layers: kernels of a stream take
        # turns.
        kept = 2 * self._spare * g.num_kv_heads * self._ragged.lines
        self._logs = torch.empty(kept, dtype=torch.float32, device=g.device)
        self._partial = torch.empty(kept, self._dim_pad, dtype=torch.float32, device=g.device)
        self._static: dict[int, torch.Tensor] = {}  # by rows
        self._plan: _Plan | None = None

    def plan(self, batch: PagedBatch) -> None:
        """List the work, on the host and without waiting for the device."""
        single = batch.max_queries == 1
        tiling = self._single if single else self._ragged
        queries = 1 if single else tiling.lines // self._group_pad  # of a tile
        tiles = [
            (row, first, min(length, length - count + first + queries))  # the last: keys that it sees
            for row, (count, length) in enumerate(zip(batch.query_lens, batch.key_lens, strict=True))
            for first in range(0, count, queries)
        ]
        if self._reach is not None:
            tiles = [(row, first, min(keys, self._reach + queries)) for row, first, keys in tiles]
        items, merges = self._divide(tiles)
        if batch.static:
            for rows, most, width in (
                (items, len(tiles) + self._spare, _ITEM),
                (merges, self._spare, _MERGE),
            ):
                rows += [(-1,) * width] * (most - len(rows))
        work = upload_ints(list(chain.from_iterable(chain(items, merges))), self._geometry.device)
        if batch.static:  # a graph reads it where it was when it was captured
            work = self._static.setdefault(len(tiles), torch.empty_like(work)).copy_(work)
        lines = self._group_pad if single else tiling.lines
        self._plan = _Plan(work, len(items), len(merges), tiling, lines)

    def _divide(self, tiles: list[tuple[int, int, int]]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Items and merges. The spare items go to tiles in proportion to their keys."""
        items: list[tuple[int, ...]] = []
        merges: list[tuple[int, ...]] = []
        total, slot = sum(keys for _, _, keys in tiles), 0
        for row, first, keys in tiles:
            parts = min(1 + keys * self._spare // total, max(1, keys // LEAST_PART))
            items += [(row, first, part, parts, slot + part) for part in range(parts)]
            if parts > 1:
                merges.append((row, first, parts, slot))
                slot += parts
        return items, merges

    def __call__(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, window: int
    ) -> torch.Tensor:
        g, plan = self._geometry, self._plan
        assert plan is not None, "not planned"
        inner = (g.head_dim, 1)
        assert q.stride()[1:] == inner and keys.is_contiguous() and values.is_contiguous()
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        tiling = plan.tiling
        shape: dict[str, Any] = {
            "KV_HEADS": g.num_kv_heads,
            "GROUP": self._group,
            "GROUP_PAD": self._group_pad,
            "DIM": g.head_dim,
            "DIM_PAD": self._dim_pad,
            "LINES": tiling.lines,
        }
        with self._on_device():
            self._kernels.attend[(g.num_kv_heads * plan.items,)](
                q,
                keys,
                values,
                out,
                self._partial,
                self._logs,
                plan.work,
                batch.cu_queries,
                batch.num_keys,
                batch.block_tables,
                batch.block_tables.stride(0),
                q.stride(0),
                g.scale * math.log2(math.e),
                PAGE=g.block_size,
                WINDOW=window,
                KEYS=tiling.keys,
                PRECISION="tf32x3",  # of float32: three products of TF32, near to exact; others are exact anyway
                num_warps=tiling.warps,
                num_stages=tiling.stages,
                **shape,
            )
            if plan.merges:
                self._kernels.merge[(g.num_kv_heads * plan.lines * plan.merges,)](
                    out,
                    self._partial,
                    self._logs,
                    plan.work,
                    plan.items * _ITEM,
                    batch.cu_queries,
                    USED=plan.lines,
                    PARTS=_MERGED_AT_A_TIME,
                    num_warps=2,
                    **shape,
                )
        return out

    def _on_device(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device, wherever the tensors are."""
        device = self._geometry.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
