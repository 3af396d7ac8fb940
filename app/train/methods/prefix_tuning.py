"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): keys and values of every layer are trained.

They begin as those that the frozen base computes for the initial embeddings: real activations, which Li & Liang found
better than random ones (section 7.4). Their own network in front of the prefix (section 4.3) is here the residual one.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from peft import PeftConfig, PrefixTuningConfig
from torch import Tensor, nn

from app.train.methods import residual
from app.train.methods.method import Group, Method, Setup, flat


class PrefixTuning(Method):
    start: Tensor  # [layers, 2, KV heads, n, head_dim]
    unit: Tensor  # [layers, 2, 1, 1, 1]: RMS of a layer's keys, and of its values

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        recipe = setup.recipe
        start = setup.keys_and_values()
        self.config = self._config(setup, start)
        self.num_frozen = self._num_frozen(setup)
        self.register_buffer("start", start)
        # NOTE: layers differ a hundredfold in the size of keys and values; in one unit for all, the rate that suits
        # the keys of one layer wrecks the values of another.
        self.register_buffer("unit", start.square().mean(dim=(2, 3, 4), keepdim=True).sqrt().clamp(min=1e-6))
        self.moved = nn.Parameter(start.new_zeros(*start.shape[:3], start.shape[3] - self.num_frozen, start.shape[4]))
        self.residual: residual.Residual | None = None
        if recipe.residual:
            width = flat(start).shape[1]
            self.residual = setup.seeded(lambda: residual.Residual(width, recipe.residual_size))

    def _config(self, setup: Setup, start: Tensor) -> PeftConfig:
        return PrefixTuningConfig(**kv_dimensions(setup, start))

    def _num_frozen(self, setup: Setup) -> int:
        return 0

    def prompt(self) -> Tensor:
        """[layers, 2, KV heads, n, head_dim]"""
        moved = F.pad(self.moved, (0, 0, self.num_frozen, 0))
        if self.residual is None:
            return self.start + self.unit * moved
        prefix = (self.start / self.unit + moved).permute(3, 0, 1, 2, 4)  # [n, layers, 2, KV heads, head_dim]
        whole: Tensor = self.residual(prefix.flatten(1)).view(prefix.shape).permute(1, 2, 3, 0, 4)
        return self.unit * whole

    def groups(self) -> list[Group]:
        found = [Group([self.moved], 1.0)]
        if self.residual is not None:
            found.append(Group(list(self.residual.parameters()), residual.SCALE))
        return found


def kv_dimensions(setup: Setup, start: Tensor) -> dict[str, Any]:
    """Of keys and values, as a PEFT configuration names them: KV heads, where it says attention heads."""
    layers, _, heads, n, head_dim = start.shape
    found = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * head_dim}
    return setup.dimensions() | found | {"num_virtual_tokens": n}
