"""CUDA kernels for attention over blocks, and the choice among them.

A kernel is not taken on trust: `choose_attention` runs it against the reference first, on the shapes it will serve.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import shutil
import subprocess
from collections.abc import Callable
from typing import Any, Literal

import torch

from app.engine.attention_check import Faulty, Unavailable, check_attention
from app.engine.paged_attention import Geometry, PagedAttention, PagedBatch, ReferenceAttention

Kind = Literal["auto", "varlen", "flashinfer", "triton", "reference"]
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
FLASH2_PAGE = 256  # block sizes that torch's own FlashAttention-2 can page: multiples of this
FLASHINFER_HEAD_DIMS = (64, 128, 256)
_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends


def _active_flash_attention() -> str:
    """The implementation behind torch's own attention: FA2, unless the process has activated another."""
    return getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)() or "FA2"


def require_card(geometry: Geometry, least: tuple[int, int]) -> None:
    """Raises Unavailable for another device than a CUDA card of this compute capability; bfloat16 needs 8.0."""
    if geometry.device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    capability = torch.cuda.get_device_capability(geometry.device)
    least = max(least, (8, 0)) if geometry.dtype is torch.bfloat16 else least
    if capability < least:
        needed, found = (f"{major}.{minor}" for major, minor in (least, capability))
        raise Unavailable(f"needs compute capability {needed}, the card has {found}")


def _has_varlen_heads(head_dim: int) -> bool:
    return head_dim % 8 == 0 and head_dim <= 256


def _find_varlen() -> Callable[..., torch.Tensor]:
    """torch's varlen_attn. Raises Unavailable where it does not know block tables."""
    try:
        varlen: Callable[..., torch.Tensor] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"torch {torch.__version__} has no varlen_attn") from error
    missing = {"block_table", "seqused_k", "enable_gqa", "num_splits"} - set(inspect.signature(varlen).parameters)
    if missing:
        raise Unavailable(f"varlen_attn of torch {torch.__version__} lacks {', '.join(sorted(missing))}")
    return varlen


def _load_varlen(geometry: Geometry) -> tuple[Callable[..., torch.Tensor], str]:
    """torch's varlen_attn and the name of the kernel behind it. Raises Unavailable."""
    require_card(geometry, (8, 0))
    varlen = _find_varlen()
    active = _active_flash_attention()
    if active == "FA2" and geometry.block_size % FLASH2_PAGE:
        raise Unavailable(f"FlashAttention-2 pages blocks of multiples of {FLASH2_PAGE}, not {geometry.block_size}")
    return varlen, active


class VarlenAttention:
    """torch.nn.attention.varlen over a block table: FlashAttention 2, or 3 where the process has activated it."""

    graphs = True

    def __init__(self, geometry: Geometry) -> None:
        if geometry.dtype not in KERNEL_DTYPES or not _has_varlen_heads(geometry.head_dim):
            raise Unavailable(f"no kernel for {geometry.dtype} and heads of {geometry.head_dim}")
        self._varlen, self._impl = _load_varlen(geometry)
        self._geometry = geometry
        self.name = f"varlen ({self._impl})"

    def plan(self, batch: PagedBatch) -> None:
        pass

    def __call__(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, window: int
    ) -> torch.Tensor:
        if window:
            span = (window - 1, 0)  # its window is how far back, ours how many
        else:
            # One query per row sees all its keys. Not calling that causal lets FlashAttention-2 treat the heads that
            # share a key head as queries of one tile.
            span = (-1, -1) if batch.max_queries == 1 else (-1, 0)
        return self._varlen(
            q,
            keys,
            values,
            batch.cu_queries,
            # FlashAttention-2 wants them, though block table and `seqused_k` say it all; 3 refuses them.
            batch.cu_keys if self._impl == "FA2" else None,
            batch.max_queries,
            batch.max_keys,
            scale=self._geometry.scale,
            window_size=span,
            enable_gqa=True,
            seqused_k=batch.num_keys,
            block_table=batch.block_tables,
            # More, or the default, leaves rows unwritten with a block table (pytorch#194167), and lets the other
            # rows of a batch change one row's rounding.
            num_splits=1,
        )


def _load_flashinfer(geometry: Geometry) -> Any:
    require_card(geometry, (7, 5))
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        raise Unavailable("flashinfer is not installed") from error


def _new_event(device: torch.device) -> Any:
    return torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]


class _Planner:
    """One of FlashInfer's wrappers. Its plan fills pinned memory that the device copies when it comes to it."""

    def __init__(self, wrapper: Any, device: torch.device) -> None:
        self.run = wrapper.run
        self._plan = wrapper.plan
        self._device = device
        self._copied = _new_event(device)

    def plan(self, *arguments: Any, **options: Any) -> None:
        """Waits until the device has the last plan, or this one would change it."""
        if self._copied is not None:
            self._copied.synchronize()
        self._plan(*arguments, **options)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))


class FlashInferAttention:
    """FlashInfer's wrappers (>= 0.6): the prefill kernel for mixed batches, the decode kernel inside graphs.

    The `fa2` kernels, on every card: they page blocks of any size and clear what stands behind a row's end.
    """

    graphs = True
    name = "flashinfer"

    def __init__(self, geometry: Geometry) -> None:
        if geometry.dtype not in KERNEL_DTYPES or geometry.head_dim not in FLASHINFER_HEAD_DIMS:
            raise Unavailable(f"no kernel for {geometry.dtype} and heads of {geometry.head_dim}")
        self._flashinfer = _load_flashinfer(geometry)
        self._geometry = geometry
        # One for all: kernels of one stream run one after the other. Zeros: FlashInfer counts in it.
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=geometry.device)
        self._ragged = {
            window: _Planner(
                self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="fa2"),
                geometry.device,
            )
            for window in geometry.windows
        }
        self._decode: dict[tuple[int, int], _Planner] = {}  # by rows and window

    def plan(self, batch: PagedBatch) -> None:
        """Both kernels read page lists instead of the batch's tensors.

        The lists are on the CPU, so planning does not wait for the device to say what is in them, only for it to have
        copied the last plan: that is at the start of the last step, so in practice long ago.
        """
        g, size = self._geometry, self._geometry.block_size
        counts = [-(-length // size) for length in batch.key_lens]
        indptr = torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32)
        indices = torch.tensor(
            [block for table, count in zip(batch.tables, counts, strict=True) for block in table[:count]],
            dtype=torch.int32,
        )
        last = torch.tensor([(length - 1) % size + 1 for length in batch.key_lens], dtype=torch.int32)
        shape = (g.num_heads, g.num_kv_heads, g.head_dim, size)
        for window in g.windows:
            options: dict[str, Any] = {
                "window_left": window - 1,  # how far back; -1: no limit
                "sm_scale": g.scale,
                "q_data_type": g.dtype,
                "kv_data_type": g.dtype,
            }
            if batch.static:
                self._decoder(len(counts), window).plan(indptr, indices, last, *shape, **options)
            else:
                queries = torch.tensor([0, *batch.query_lens]).cumsum(0, dtype=torch.int32)
                self._ragged[window].plan(queries, indptr, indices, last, *shape, causal=True, **options)

    def _decoder(self, rows: int, window: int) -> _Planner:
        if (rows, window) not in self._decode:
            sizes = (rows + 1, rows * self._geometry.max_blocks, rows)
            indptr, indices, last = (torch.zeros(n, dtype=torch.int32, device=self._geometry.device) for n in sizes)
            wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=self._geometry.num_heads >= 4 * self._geometry.num_kv_heads,
                paged_kv_indptr_buffer=indptr,
                paged_kv_indices_buffer=indices,
                paged_kv_last_page_len_buffer=last,
                backend="fa2",
            )
            self._decode[rows, window] = _Planner(wrapper, self._geometry.device)
        return self._decode[rows, window]

    def __call__(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, window: int
    ) -> torch.Tensor:
        wrapper = self._decode[len(batch.num_keys), window] if batch.static else self._ragged[window]
        out: torch.Tensor = wrapper.run(q.contiguous(), (keys, values))
        return out


def preferred_block_size(device: torch.device, dtype: torch.dtype, default: int, *, head_dim: int, fused: bool) -> int:
    """The block size to give the cache so that `auto` finds a kernel for it.

    `fused`: whether a fused decoder runs the model, for nothing else uses the kernels. Only FlashAttention-2, which
    comes with torch from 2.13 on, is particular about block sizes.
    """
    if not fused or device.type != "cuda" or dtype not in KERNEL_DTYPES or not _has_varlen_heads(head_dim):
        return default
    if torch.cuda.get_device_capability(device) < (8, 0) or _active_flash_attention() != "FA2":
        return default
    if head_dim in FLASHINFER_HEAD_DIMS and importlib.util.find_spec("flashinfer") is not None:
        return default
    try:
        _find_varlen()
    except Unavailable:
        return default
    return FLASH2_PAGE


def _triton_attention(geometry: Geometry) -> PagedAttention:
    from app.engine.triton_attention import TritonAttention  # it imports this module

    return TritonAttention(geometry)


_KERNELS: dict[str, Callable[[Geometry], PagedAttention]] = {
    "flashinfer": FlashInferAttention,
    "varlen": VarlenAttention,
    "triton": _triton_attention,
}


def _wants_compiler(error: Exception) -> bool:
    """Whether Triton failed because it could not build its launcher, which is C, when a kernel was first used."""
    has_compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return isinstance(error, subprocess.CalledProcessError) or (not has_compiler and "C compiler" in str(error))


def choose_attention(kind: Kind, geometry: Geometry) -> tuple[PagedAttention, list[Unavailable]]:
    """The implementation, and why not those before it. Raises Unavailable for a `kind` that is not to be had.

    A reason, raised or returned, is `Faulty` where the implementation exists for this machine and model but failed or
    gave other numbers than the reference; a plain `Unavailable` where it cannot exist (not installed, no kernel for
    the dtype, the heads, the block size or the card). Its text starts with the implementation's name.
    """
    reasons: list[Unavailable] = []
    for name, kernel in _KERNELS.items():
        if kind not in ("auto", name):
            continue
        try:
            attention = kernel(geometry)
            check_attention(attention, geometry)
            return attention, reasons
        except Exception as error:  # a kernel may fail to build, to load or to launch, each in its own way
            # One that cannot exist says so itself, in its constructor.
            reason_type = Unavailable if type(error) is Unavailable else Faulty
            reason = reason_type(f"{name} attention: {error}")
            if name == "triton" and _wants_compiler(error):
                reason = Unavailable(f"{name} attention: it needs a C compiler, install gcc and libc6-dev ({error})")
            if kind == name:
                raise reason from error
            reasons.append(reason)
    return ReferenceAttention(geometry), reasons
