"""The base model and the engine as the settings describe them; they themselves know of no settings."""

from __future__ import annotations

import torch

from app.base_model import BaseModel, load_base_model
from app.config import Settings
from app.engine.local import LocalEngine


def load_base(settings: Settings) -> BaseModel:
    """Also limits torch's threads, where the settings do. Raises InvalidBaseModel."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return load_base_model(
        settings.model,
        cache_dir=settings.cache_dir,
        device=settings.device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
    )


def local_engine(settings: Settings, base: BaseModel) -> LocalEngine:
    """Not started yet. Raises InvalidBaseModel for a quantization that cannot be had here."""
    return LocalEngine(
        base.model,
        base.info,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_waiting=settings.max_waiting,
        kv_cache_tokens=settings.kv_cache_tokens,
        host_cache_bytes=settings.host_cache_bytes,
        cache_dir=settings.cache_dir / "native",
        quantization=None if settings.quantization == "none" else settings.quantization,
    )
