"""The native decoder: a Llama-family model's forward over ragged rows, one C call a step.

A row's logits are the same bits whatever else is in the batch and however its prompt was chunked.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from app.engine.forward import Span
from app.engine.kv_cache import KVCache
from app.engine.native.build import NativeUnavailable, load_kernel
from app.engine.native.panels import Packer, Panels, Storage, gated_outputs, pad_vector
from app.engine.weights import DecoderWeights, LayerWeights, wrong_shapes


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("panels", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("storage", ctypes.c_int32),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("qkv", "o", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        ("window", ctypes.c_int64),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("head", _Matrix),
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "cos", "sin", "kv")),
        *((name, ctypes.c_int32) for name in ("num_layers", "hidden", "num_heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_int32) for name in ("intermediate", "vocab", "max_positions")),
        *((name, ctypes.c_int32) for name in ("num_blocks", "block_size", "quantized")),
        *((name, ctypes.c_float) for name in ("eps", "attention_scale")),
    ]


_COMPACT = {Storage.BLOCKS: "8-bit blocks", Storage.BFLOAT16: "bfloat16"}


class NativeDecoder:
    """Implements `Forward`. It has `num_threads - 1` threads of its own, asleep between calls; torch's do not matter.

    `close()` waits for a call that is running in another thread; at the end of the process nothing is torn down, for
    such a call would lose its memory.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        cache: KVCache,
        *,
        quantization: Literal["int8"] | None = None,
        num_threads: int = 1,
        cache_dir: Path | None = None,
    ) -> None:
        """Packs the weights. `cache_dir` keeps the compiled kernel.

        Raises NativeUnavailable if the kernel cannot be had, ValueError for a model it does not cover.
        """
        _require_supported(weights, cache)
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads} but must be at least 1")
        self._kernel = _declare(load_kernel(cache_dir))
        self._quantized = quantization == "int8"
        self._num_threads = num_threads
        self._vocab_size, self._hidden_size = weights.lm_head.shape
        self._storages: set[Storage] = set()
        self.weight_bytes: int  # that a step of one row reads: of matrices, and one row of the embedding
        self._kept: list[Any] = [weights, cache]  # what the kernel points to
        model = self._model(weights, cache)
        handle = self._kernel.softprompt_create(ctypes.byref(model), num_threads)
        if not handle:
            raise NativeUnavailable("there is no memory or no thread for it")
        self._handle = ctypes.c_void_p(handle)
        self._lock = threading.Lock()  # one call at a time, and none while or after the decoder is destroyed
        self.close = weakref.finalize(self, _destroy, self._kernel, self._handle, self._kept, self._lock)
        self.close.atexit = False

    @property
    def describe(self) -> str:
        """See `Forward`."""
        kind = "int8" if self._quantized else "float32"
        if names := [name for storage, name in _COMPACT.items() if storage in self._storages]:
            names += ["float32"] * (Storage.FLOAT32 in self._storages)
            kind += f" (weights held in {' and '.join(names)}, exact)"
        return f"native Llama-family decoder in {kind}, threads: {self._num_threads}"

    def __call__(self, spans: Sequence[Span]) -> torch.Tensor:
        """See `Forward`. Raises ValueError, before anything is written, for what no row may name; RuntimeError when
        the decoder is closed.
        """
        tables, token_ids, records = array("i"), array("i"), array("q")
        kept, num_logits = [], 0
        for span in spans:
            inputs, embeddings = span.inputs, 0
            if len(inputs) != span.end - span.start:
                raise ValueError(f"{len(inputs)} inputs for the positions [{span.start}, {span.end})")
            table, first_id = len(tables), len(token_ids)
            tables.extend(span.block_table)
            if isinstance(inputs, torch.Tensor) and inputs.dim() == 2:
                if inputs.shape[1] != self._hidden_size:
                    raise ValueError(f"embeddings are {inputs.shape[1]} wide, the model {self._hidden_size}")
                inputs = inputs.detach().to("cpu", torch.float32).contiguous()
                kept.append(inputs)
                embeddings = inputs.data_ptr()
            else:
                token_ids.extend(inputs.tolist() if isinstance(inputs, torch.Tensor) else inputs)
            num_logits += span.num_logits
            records.extend((span.start, span.end, span.num_logits, table, len(span.block_table), first_id, embeddings))
        logits = torch.empty(max(num_logits, 0), self._vocab_size)
        with self._lock:
            if not self.close.alive:
                raise RuntimeError("the decoder is closed")
            error = self._kernel.softprompt_step(
                self._handle,
                records.buffer_info()[0],
                len(spans),
                tables.buffer_info()[0],
                token_ids.buffer_info()[0],
                logits.data_ptr(),
            )
        if error:
            _raise(error)
        return logits

    def _model(self, weights: DecoderWeights, cache: KVCache) -> _Model:
        packer = Packer(self._kernel, _matrix_shapes(weights), quantized=self._quantized)
        layers = (_Layer * len(weights.layers))(*(self._layer(layer, packer) for layer in weights.layers))
        self._kept.append(layers)
        head = packer.stack([weights.lm_head], [weights.lm_head_bias])
        self.weight_bytes = packer.used + weights.embedding[0].nbytes
        return _Model(
            layers=layers,
            head=self._matrix(head),
            embedding=self._pointer(weights.embedding),
            norm=self._pointer(pad_vector(weights.norm)),
            cos=self._pointer(weights.cos),
            sin=self._pointer(weights.sin),
            kv=self._pointer(cache.data),
            num_layers=len(weights.layers),
            hidden=self._hidden_size,
            num_heads=weights.num_heads,
            kv_heads=weights.num_kv_heads,
            head_dim=weights.head_dim,
            intermediate=weights.intermediate_size,
            vocab=self._vocab_size,
            max_positions=len(weights.cos),
            num_blocks=cache.data.shape[2] // cache.block_size,
            block_size=cache.block_size,
            quantized=self._quantized,
            eps=weights.eps,
            attention_scale=weights.attention_scale,
        )

    def _layer(self, layer: LayerWeights, packer: Packer) -> _Layer:
        qkv, qkv_biases = [layer.q, layer.k, layer.v], [layer.q_bias, layer.k_bias, layer.v_bias]
        gated, gated_biases = [layer.gate, layer.up], [layer.gate_bias, layer.up_bias]
        return _Layer(
            qkv=self._matrix(packer.stack(qkv, qkv_biases)),
            o=self._matrix(packer.stack([layer.o], [layer.o_bias])),
            gate_up=self._matrix(packer.alternate(gated, gated_biases)),
            down=self._matrix(packer.stack([layer.down], [layer.down_bias])),
            attention_norm=self._pointer(pad_vector(layer.input_norm)),
            mlp_norm=self._pointer(pad_vector(layer.mlp_norm)),
            q_norm=self._pointer(None if layer.q_norm is None else pad_vector(layer.q_norm)),
            k_norm=self._pointer(None if layer.k_norm is None else pad_vector(layer.k_norm)),
            window=layer.window,
        )

    def _matrix(self, panels: Panels) -> _Matrix:
        self._storages.add(panels.storage)
        return _Matrix(
            panels=self._pointer(panels.weights),
            scale=self._pointer(panels.scale),
            bias=self._pointer(panels.bias),
            n=len(panels.bias),
            k=panels.num_inputs,
            storage=panels.storage,
        )

    def _pointer(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor)
        return tensor.data_ptr()


def _matrix_shapes(weights: DecoderWeights) -> Iterator[tuple[int, int]]:
    """(outputs, inputs) of all that are packed."""
    for layer in weights.layers:
        yield len(layer.q) + len(layer.k) + len(layer.v), layer.q.shape[1]
        yield layer.o.shape[0], layer.o.shape[1]
        yield gated_outputs(len(layer.gate)), layer.gate.shape[1]
        yield layer.down.shape[0], layer.down.shape[1]
    yield weights.lm_head.shape[0], weights.lm_head.shape[1]


def _require_supported(weights: DecoderWeights, cache: KVCache) -> None:
    """The kernel trusts all sizes. Raises ValueError."""
    tensors = [value for value in vars(weights).values() if isinstance(value, torch.Tensor)] + [cache.data]
    for layer in weights.layers:
        tensors += [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        raise ValueError("the native decoder needs float32 weights and keys and values, on the CPU")
    if not all(tensor.is_contiguous() for tensor in (weights.embedding, weights.cos, weights.sin, cache.data)):
        raise ValueError("the native decoder needs contiguous tensors")
    if weights.head_dim % 8:
        raise ValueError(f"the native decoder needs heads of a multiple of 8 numbers, not {weights.head_dim}")
    if weights.num_heads % weights.num_kv_heads:
        raise ValueError("the native decoder needs a whole number of query heads per key/value head")
    if not weights.layers or any(layer.window < 0 for layer in weights.layers):
        raise ValueError("the native decoder needs layers, and windows of 0 positions or more")
    if weights.embedding.dim() != 2:
        raise ValueError(f"the embedding has the shape {tuple(weights.embedding.shape)}")
    if wrong := wrong_shapes(weights, weights.embedding.shape[1]):
        raise ValueError(f"sizes that do not fit each other: {'; '.join(wrong)}")
    num_slots = cache.data.shape[2] if cache.data.dim() == 5 else 0
    shape = (len(weights.layers), 2, num_slots, weights.num_kv_heads, weights.head_dim)
    if cache.data.shape != shape or not 0 < cache.block_size <= num_slots or num_slots % cache.block_size:
        raise ValueError(
            f"a KV cache of the shape {tuple(cache.data.shape)} in blocks of {cache.block_size} does not fit the model"
        )


def _declare(kernel: ctypes.CDLL) -> ctypes.CDLL:
    pointer = ctypes.c_void_p
    kernel.softprompt_create.argtypes = [ctypes.POINTER(_Model), ctypes.c_int]
    kernel.softprompt_create.restype = pointer
    kernel.softprompt_step.argtypes = [pointer, pointer, ctypes.c_int, pointer, pointer, pointer]
    kernel.softprompt_destroy.argtypes = [pointer]
    kernel.softprompt_destroy.restype = None
    kernel.softprompt_pack.argtypes = [pointer, *[ctypes.c_int64] * 4, ctypes.c_int32, pointer, pointer]
    kernel.softprompt_pack.restype = ctypes.c_bool
    kernel.softprompt_panel_bytes.argtypes = [ctypes.c_int32, ctypes.c_int64]
    kernel.softprompt_panel_bytes.restype = ctypes.c_size_t
    kernel.softprompt_use_large_pages.argtypes = [pointer, ctypes.c_size_t]
    kernel.softprompt_use_large_pages.restype = None
    return kernel


def _destroy(kernel: ctypes.CDLL, handle: ctypes.c_void_p, kept: list[Any], lock: threading.Lock) -> None:
    """`kept` lives until the last thread is gone."""
    with lock:
        kernel.softprompt_destroy(handle)
        kept.clear()


def _raise(error: int) -> None:
    if error == 1:
        raise MemoryError("no memory for a step of the native decoder")
    raise ValueError(
        {
            2: "a token id is not in the vocabulary",
            3: "a block table is too short or names a block that is not there",
            4: "positions must ascend, end within the model's length, and include those that want logits",
        }[error]
    )
