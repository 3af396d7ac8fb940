"""Residual reparameterisation of a soft prompt (Razdaibiedina et al. 2023, arXiv:2305.03937), folded at export."""

from __future__ import annotations

from torch import Tensor, nn

# A recipe's rate is for elements of about unit size; the weights of a layer are about 1/sqrt(width).
SCALE = 0.02


class Residual(nn.Module):
    """P + LayerNorm(W_up ReLU(W_down P)), one network for all virtual tokens; P [n, width] in units of its own size.

    The gain of the norm starts at zero, so that the prompt begins where P does.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        self.norm = nn.LayerNorm(width)
        nn.init.zeros_(self.norm.weight)

    def forward(self, prompt: Tensor) -> Tensor:
        added: Tensor = self.norm(self.up(self.down(prompt).relu()))
        return prompt + added
