"""What every way of running the base model has in common: ragged rows in, logits out, keys and values in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Inputs = Sequence[int] | torch.Tensor  # token ids, or embeddings [positions, hidden_size]


@dataclass(frozen=True, eq=False)
class Span:
    """Positions [start, end) of one row: what the model reads there, and where its keys and values live.

    `inputs` are the token ids of those positions, or the virtual tokens of a soft prompt.
    Everything before `start` is in the blocks already. Spans of one call never write the same slot, and none reads
    what another of the same call writes.
    """

    block_table: list[int]
    start: int
    end: int
    inputs: Inputs
    num_logits: int  # of how many last positions; 0: only the keys and values are wanted

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


class Forward(Protocol):
    """One forward pass of the frozen base model over rows of any lengths, mixed."""

    @property
    def describe(self) -> str:
        """What runs the model, and how, for people: logs and /info."""
        ...

    def __call__(self, spans: Sequence[Span]) -> torch.Tensor:
        """Write every span's keys and values into its blocks; float32 logits [sum of num_logits, vocab_size].

        Logits come in the order of the spans and, within one, of the positions. A row's logits do not depend on the
        rows beside it beyond rounding.
        """
        ...
