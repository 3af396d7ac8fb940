"""The model as the engine runs it, with its memory for keys and values: what outlives a crash of the engine's loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from app.engine.attention_kernels import preferred_block_size
from app.engine.backend import Quantization, build_forward
from app.engine.block_manager import BlockManager
from app.engine.core import EngineCore
from app.engine.host_cache import HostCache
from app.engine.kv_cache import KVCache, default_num_tokens
from app.engine.model_runner import ModelRunner, self_check, self_check_blocks
from app.engine.native.decoder import NativeDecoder
from app.engine.scheduler import Scheduler
from app.engine.weights import decoder_weights
from app.soft_prompt import BaseInfo

BLOCK_SIZE = 16  # positions, where the device's attention does not want another
# Tokens of prompt text in one step: as many as the device computes in about the time that reading the weights takes,
# so that a long prompt delays running streams little and wastes little.
CPU_BATCHED_TOKENS = 128
GPU_BATCHED_TOKENS = 2048
TOLERANCE = 5e-2  # of logits in `self_check`, relative to the largest
INT8_TOLERANCE = 0.2
MOST_TOLERANCE = 0.5  # a wrong mask or a wrong position is about 1 away


def self_check_tolerance(dtype: torch.dtype, num_layers: int, quantization: Quantization | None = None) -> float:
    """How far from the model's own forward `self_check` lets logits be, relative to the largest.

    Two right forwards differ by how they round. Every layer adds errors of about `eps` (2**-7 in bfloat16), each its
    own, so they grow with the root of their number: the difference is c * eps * sqrt(num_layers). In bfloat16 models
    with random weights, the worst there are, had c from 0.4 to 1.7 at 2 to 80 layers, and an 8 B Llama on an H100 had
    2.25 (0.0994 at 32 layers): allowed is 6. Shallow models have few errors to average: one of 3 layers with large
    weights was 13 eps away, allowed are 32. In bfloat16 that is 0.25 up to 28 layers, 0.27 at 32 and 0.42 at 80; in
    float32 all of it is far below `TOLERANCE`.
    """
    noise = torch.finfo(dtype).eps * max(32.0, 6.0 * math.sqrt(num_layers))
    return min(MOST_TOLERANCE, max(INT8_TOLERANCE if quantization else TOLERANCE, noise))


class LoadedModel:
    """For one thread. Nothing of a request is in it but what the blocks hold, which new books never read."""

    def __init__(
        self,
        model: Any,
        info: BaseInfo,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int | None,
        kv_cache_tokens: int | None,
        host_cache_bytes: int,
        quantization: Quantization | None,
        cache_dir: Path | None,
    ) -> None:
        """See `LocalEngine`."""
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if trainable:
            raise ValueError(f"the base model must be frozen; {trainable[0]} requires grad")
        fused = decoder_weights(model, info.max_model_len) is not None
        block_size = preferred_block_size(model.device, model.dtype, BLOCK_SIZE, head_dim=info.head_dim, fused=fused)
        if kv_cache_tokens is None:
            kv_cache_tokens = default_num_tokens(info, model.dtype, model.device, block_size)
        if max_num_batched_tokens is None:
            max_num_batched_tokens = CPU_BATCHED_TOKENS if model.device.type == "cpu" else GPU_BATCHED_TOKENS
        self._model = model
        self._info = info
        self._block_size = block_size
        self._num_blocks = 1 + -(-kv_cache_tokens // block_size)
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs + block_size)
        self._host = HostCache(host_cache_bytes)
        self._cache = KVCache(
            info, num_blocks=self._num_blocks, block_size=block_size, dtype=model.dtype, device=model.device
        )
        self._forward = build_forward(model, info, self._cache, quantization, cache_dir)
        self._tolerance = self_check_tolerance(model.dtype, info.num_layers, quantization)

    @property
    def describe(self) -> str:
        """See `Forward`."""
        return self._forward.describe

    @property
    def is_native(self) -> bool:
        """Whether the native decoder runs it, with threads of its own."""
        return isinstance(self._forward, NativeDecoder)

    @property
    def weight_bytes(self) -> int | None:
        """How many a step of one row reads; None where that is not known."""
        return self._forward.weight_bytes if isinstance(self._forward, NativeDecoder) else None

    @property
    def block_bytes(self) -> int:
        """Of the keys and values of one block, in all layers."""
        return self._cache.block_bytes

    def check(self, blocks: BlockManager) -> None:
        """Hold it to the model's own forward. Raises InvalidBaseModel, and ValueError if there are too few blocks."""
        wanted = self_check_blocks(self._model, self._info, self._block_size)
        lent = blocks.allocate(max(2, min(wanted, blocks.num_usable_blocks)))
        if lent is None:
            raise ValueError(f"the KV cache needs at least {2 * self._block_size} tokens")
        self_check(self._forward, self._model, self._info, lent, self._block_size, tolerance=self._tolerance)
        blocks.release(lent)

    def new_core(self) -> EngineCore:
        """Empty books over the same memory; what stale blocks hold is never read."""
        blocks = BlockManager(self._num_blocks, self._block_size)
        runner = ModelRunner(self._forward, self._cache, self._host)
        scheduler = Scheduler(
            blocks, self._max_num_seqs, self._max_num_batched_tokens, has_keys_and_values=runner.has_keys_and_values
        )
        return EngineCore(blocks, scheduler, runner)
