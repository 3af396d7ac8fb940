"""The engine as the settings describe it; the engine itself knows of no settings."""

from __future__ import annotations

from app.base_model import BaseModel
from app.config import Settings
from app.engine.local import LocalEngine


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
