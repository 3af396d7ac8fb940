"""P-tuning (Liu et al. 2021, arXiv:2103.10385): a small network makes the virtual tokens, and is folded at the end."""

from __future__ import annotations

from typing import Any

import torch
from peft import PromptEncoder, PromptEncoderConfig
from torch import Tensor

from app.train.methods.method import Group, Method, Setup


class PTuning(Method):
    indices: Tensor  # [1, n]

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        start, recipe = setup.embeddings(), setup.recipe
        self.config = PromptEncoderConfig(
            num_virtual_tokens=len(start),
            encoder_reparameterization_type=recipe.encoder.upper(),
            encoder_hidden_size=recipe.encoder_hidden_size,
            **setup.dimensions(),
        )
        self.encoder: Any = setup.seeded(lambda: PromptEncoder(self.config))  # type: ignore[no-untyped-call]
        self.rms = setup.rms
        self.register_buffer("indices", torch.arange(len(start), device=setup.device)[None], persistent=False)
        self._begin_at(start)

    def prompt(self) -> Tensor:
        """[n, hidden]"""
        made: Tensor = self.encoder(self.indices)[0]
        return self.rms * made

    def groups(self) -> list[Group]:
        return [Group(list(self.encoder.parameters()), 1.0)]

    @torch.no_grad()
    def _begin_at(self, start: Tensor) -> None:
        """Solve for the last layer that makes the network's first output `start`.

        Exact while there are no more virtual tokens than hidden units, nearest beyond that.
        """
        hidden = self.encoder.embedding(self.indices)
        if hasattr(self.encoder, "lstm_head"):
            hidden = self.encoder.lstm_head(hidden)[0]
        *body, last = self.encoder.mlp_head
        for layer in body:
            hidden = layer(hidden)
        # float64 on the CPU: ranks are judged there, and some devices have neither
        solved = torch.linalg.pinv(hidden[0].double().cpu()) @ (start / self.rms).double().cpu()
        last.weight.copy_(solved.T)
        last.bias.zero_()
