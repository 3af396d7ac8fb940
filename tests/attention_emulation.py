"""What the CUDA kernels promise, in plain torch: their arguments are checked, their results are exact.

Each reads no more of the pool than its arguments allow it to; everything else in the pool may be garbage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, left: int, right: int) -> torch.Tensor:
    """q [Q, heads, D], k and v [K, kv heads, D]; the last query stands at the last key."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1).double(), v.repeat_interleave(repeat, dim=1).double()
    at = torch.arange(len(k) - len(q), len(k))[:, None]
    keys = torch.arange(len(k))
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
    if left >= 0:
        hidden |= keys < at - left
    if right >= 0:
        hidden |= keys > at + right
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def pages(pool: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    size = pool.shape[1]
    return pool[table[: -(-length // size)].long()].flatten(0, 1)[:length]


class Varlen:
    """torch.nn.attention.varlen.varlen_attn with a block table (torch 2.13), as FlashAttention 2 or 3 take it."""

    def __init__(self, impl: str) -> None:
        self.impl = impl
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor | None,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
        num_splits: int | None = None,
    ) -> torch.Tensor:
        assert seqused_k is not None and block_table is not None and scale is not None
        rows = len(cu_seq_q) - 1
        assert query.dim() == 3 and key.dim() == value.dim() == 4 and key.shape == value.shape
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        for ints in (cu_seq_q, seqused_k, block_table):
            assert ints.dtype == torch.int32 and ints.is_contiguous()
        assert seqused_k.shape == (rows,) and block_table.shape[0] == rows and block_table.dim() == 2
        assert int(cu_seq_q[0]) == 0 and int(cu_seq_q[-1]) == len(query)
        lengths = cu_seq_q.diff()
        assert max_q == int(lengths.max()) and max_k >= int(seqused_k.max())
        assert enable_gqa or query.shape[1] == key.shape[2]
        assert num_splits == 1, "pytorch#194167"
        if self.impl == "FA2":
            assert key.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
            assert cu_seq_k is not None and cu_seq_k.dtype == torch.int32 and cu_seq_k.is_contiguous()
            assert cu_seq_k.diff().tolist() == seqused_k.tolist()
        else:
            assert cu_seq_k is None, "If cu_seqlens_k is passed in, then page table is not supported"
        self.calls.append({"window_size": window_size, "max_q": max_q, "max_k": max_k, "rows": rows})
        out = torch.full_like(query, torch.nan, memory_format=torch.contiguous_format)
        for i in range(rows):
            used = int(seqused_k[i])
            k, v = pages(key, block_table[i], used), pages(value, block_table[i], used)
            a, b = int(cu_seq_q[i]), int(cu_seq_q[i + 1])
            out[a:b] = attend(query[a:b], k, v, scale, left=window_size[0], right=window_size[1])
        return out


class FlashInfer:
    """The two wrappers of flashinfer 0.7 that we use: `plan` on the host, `run` on what was planned."""

    def __init__(self) -> None:
        self.decode_plans = 0
        self.prefill_plans = 0
        self.BatchPrefillWithPagedKVCacheWrapper: Callable[..., Any] = lambda *a, **k: _Prefill(self, *a, **k)
        self.BatchDecodeWithPagedKVCacheWrapper: Callable[..., Any] = lambda *a, **k: _Decode(self, *a, **k)


def _check_lists(indptr: torch.Tensor, indices: torch.Tensor, last: torch.Tensor, page_size: int) -> None:
    assert indptr.dtype == indices.dtype == last.dtype == torch.int32
    assert int(indptr[0]) == 0 and int(indptr[-1]) == len(indices) and len(indptr) == len(last) + 1
    assert int(last.min()) >= 1 and int(last.max()) <= page_size
    assert int(indptr.diff().min()) >= 1


class _Wrapper:
    def _attend(
        self, q: torch.Tensor, pool: tuple[torch.Tensor, torch.Tensor], queries: list[int], lists: Any, o: Any
    ) -> torch.Tensor:
        indptr, indices, last = lists
        size = pool[0].shape[1]
        out = []
        for i, q_row in enumerate(q.split_with_sizes(queries)):
            table = indices[int(indptr[i]) : int(indptr[i + 1])]
            length = (len(table) - 1) * size + int(last[i])
            k, v = pages(pool[0], table, length), pages(pool[1], table, length)
            out.append(attend(q_row, k, v, o["sm_scale"], left=o["window_left"], right=0))
        return torch.cat(out)


class _Prefill(_Wrapper):
    def __init__(self, owner: FlashInfer, workspace: torch.Tensor, kv_layout: str = "NHD", *, backend: str) -> None:
        assert kv_layout == "NHD" and backend == "fa2" and workspace.dtype == torch.uint8 and not workspace.any()
        self._owner = owner

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float,
        window_left: int = -1,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert causal and qo_indptr.dtype == torch.int32
        _check_lists(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
        self._shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._queries = qo_indptr.diff().tolist()
        self._lists = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._options = {"sm_scale": sm_scale, "window_left": window_left, "dtype": q_data_type}
        assert q_data_type == kv_data_type
        self._owner.prefill_plans += 1

    def run(self, q: torch.Tensor, pool: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        assert q.is_contiguous() and q.dtype == self._options["dtype"]
        assert (q.shape[1], pool[0].shape[2], q.shape[2], pool[0].shape[1]) == self._shape
        return self._attend(q, pool, self._queries, self._lists, self._options)


class _Decode(_Wrapper):
    def __init__(
        self,
        owner: FlashInfer,
        workspace: torch.Tensor,
        kv_layout: str = "NHD",
        *,
        use_cuda_graph: bool,
        use_tensor_cores: bool,
        paged_kv_indptr_buffer: torch.Tensor,
        paged_kv_indices_buffer: torch.Tensor,
        paged_kv_last_page_len_buffer: torch.Tensor,
        backend: str,
    ) -> None:
        assert kv_layout == "NHD" and use_cuda_graph and backend == "fa2" and workspace.dtype == torch.uint8
        assert isinstance(use_tensor_cores, bool)
        self._owner = owner
        self._buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        assert len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        _check_lists(indptr, indices, last_page_len, page_size)
        assert len(last_page_len) == len(self._buffers[2]), "the batch size should be fixed in cudagraph mode"
        assert len(indices) <= len(self._buffers[1]) and q_data_type == kv_data_type
        self._shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
        for buffer, values in zip(self._buffers, (indptr, indices, last_page_len), strict=True):
            buffer[: len(values)].copy_(values)
        self._options = {"sm_scale": sm_scale, "window_left": window_left, "dtype": q_data_type}
        self._owner.decode_plans += 1

    def run(self, q: torch.Tensor, pool: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        assert q.is_contiguous() and q.dtype == self._options["dtype"]
        assert (q.shape[1], pool[0].shape[2], q.shape[2], pool[0].shape[1]) == self._shape
        return self._attend(q, pool, [1] * len(q), self._buffers, self._options)
