"""Which way of running the base model suits it and the device best."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch

from app.engine.decoder import FusedDecoder
from app.engine.forward import Forward
from app.engine.kv_cache import KVCache
from app.engine.native.build import NativeUnavailable
from app.engine.native.decoder import NativeDecoder
from app.engine.transformers_forward import TransformersForward
from app.engine.weights import decoder_weights
from app.errors import InvalidBaseModel
from app.soft_prompt import BaseInfo

log = logging.getLogger(__name__)

Quantization = Literal["int8"]


def build_forward(
    model: Any, info: BaseInfo, cache: KVCache, quantization: Quantization | None, cache_dir: Path | None = None
) -> Forward:
    """The native decoder on a CPU, the torch decoder elsewhere, the model's own forward for other architectures.

    Raises InvalidBaseModel if `quantization` is asked for where only the native decoder could give it.
    """
    weights = decoder_weights(model, info.max_model_len)
    if weights is not None and model.device.type == "cpu":
        try:
            num_threads = torch.get_num_threads()
            return NativeDecoder(
                weights, cache, quantization=quantization, num_threads=num_threads, cache_dir=cache_dir
            )
        except (NativeUnavailable, ValueError) as error:
            reason = str(error)
            log.warning("the native decoder cannot be used: %s; torch runs the model, slower", reason)
    else:
        reason = f"it needs a CPU and a model of the Llama family, not {info.architecture} on {model.device.type}"
    if quantization is not None:
        raise InvalidBaseModel(f"quantization {quantization!r} cannot be had: {reason}")
    if weights is not None:
        return FusedDecoder(model, weights, cache)
    return TransformersForward(model, cache)
