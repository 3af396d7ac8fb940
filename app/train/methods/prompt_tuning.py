"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): the virtual tokens' embeddings themselves are trained.

From another task's prompt it is SPoT's transfer (Vu et al. 2022, arXiv:2110.07904).
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PromptEmbedding, PromptTuningConfig
from torch import Tensor

from app.train.methods import residual
from app.train.methods.method import Group, Method, Setup


class PromptTuning(Method):
    def __init__(self, setup: Setup) -> None:
        super().__init__()
        start, recipe = setup.embeddings(), setup.recipe
        self.config = PromptTuningConfig(num_virtual_tokens=len(start), **setup.dimensions())
        words = setup.model.get_input_embeddings()
        self.encoder: Any = setup.seeded(lambda: PromptEmbedding(self.config, words))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.encoder.embedding.weight.copy_(start)
        self.rms = setup.rms
        self.residual: residual.Residual | None = None
        if recipe.residual:
            self.residual = setup.seeded(lambda: residual.Residual(start.shape[1], recipe.residual_size))

    def prompt(self) -> Tensor:
        """[n, hidden]"""
        weight: Tensor = self.encoder.embedding.weight
        return weight if self.residual is None else self.rms * self.residual(weight / self.rms)

    def groups(self) -> list[Group]:
        found = [Group([self.encoder.embedding.weight], self.rms)]
        if self.residual is not None:
            found.append(Group(list(self.residual.parameters()), residual.SCALE))
        return found
