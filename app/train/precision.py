"""Mixed precision: products of matrices in bfloat16, everything that is added up or kept in float32."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from app.train.initial import embedding_weight
from app.train.recipe import Precision

# Without such instructions bfloat16 is emulated: a hundred times slower than float32.
_CPU_FEATURES = ("avx512_bf16", "amx_bf16")


def product_dtype(model: PreTrainedModel, precision: Precision) -> torch.dtype:
    """What matrices are multiplied in: the type of the weights, or bfloat16 in place of float32 where that is faster.

    That is on a CPU with instructions for it; a GPU that is to be fast has its weights in bfloat16 to begin with.
    """
    weight = embedding_weight(model)
    may = precision == "auto" and weight.dtype == torch.float32 and weight.device.type == "cpu"
    return torch.bfloat16 if may and cpu_has_bfloat16() else weight.dtype


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 natively."""
    if not hasattr(torch.cpu, "get_capabilities"):  # in every torch that is supported but the oldest
        return False
    features = torch.cpu.get_capabilities()
    return any(features.get(name) for name in _CPU_FEATURES)


def mixed_precision(device: torch.device, *, enabled: bool = True) -> torch.autocast:
    """Products in bfloat16 of what is float32 (Micikevicius et al. 2018, arXiv:1710.03740; bfloat16 needs no scale).

    Without autocast's cache, in which the copy of a weight that is trained outlives the step that changes it.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)
