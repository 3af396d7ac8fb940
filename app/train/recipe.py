"""The recipe of one training run: a frozen value, checked when it is built."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from app.errors import InvalidRecipe

_INTEGER_LIMITS = {
    "num_virtual_tokens": (1, 1024),
    "batch_size": (1, 1024),
    "max_steps": (1, 1_000_000),
    "warmup_steps": (0, 1_000_000),
    "eval_every": (1, 1_000_000),
    "eval_rows": (1, 1_000_000),
    "checkpoint_every": (1, 1_000_000),
    "patience": (1, 1_000_000),
    "seed": (0, 2**63 - 1),
    "max_length": (2, 1_048_576),
}
_NUMBER_LIMITS = {
    "learning_rate": (1e-8, 10.0),
    "weight_decay": (0.0, 1.0),
    "max_grad_norm": (1e-6, 1e6),
}
_INIT_TEXT_CHARACTERS = 10_000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one soft prompt is trained (prompt tuning, Lester et al. 2021, arXiv:2104.08691).

    `learning_rate` and `max_grad_norm` are in units of the base's embedding RMS: one AdamW step
    moves an element by about `learning_rate` times the typical size of an embedding element, so
    one value serves bases whose embeddings differ in scale by orders of magnitude.

    Raises InvalidRecipe, naming the field, its value and the limit.
    """

    num_virtual_tokens: int = 20
    init_text: str = ""  # empty: random rows of the vocabulary, drawn with `seed`
    # times the embedding RMS; of 0.05, 0.2 and 0.5, 0.2 was best on SmolLM2-135M after 60 steps
    learning_rate: float = 0.2
    batch_size: int = 16  # rows
    max_steps: int = 300
    warmup_steps: int = 15
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_every: int = 25  # steps
    eval_rows: int = 200  # validation rows measured each time, a seeded sample
    checkpoint_every: int = 10  # steps
    patience: int = 6  # evaluations without improvement before stopping
    seed: int = 0
    max_length: int = 512  # tokens of prompt and answer, virtual tokens not counted

    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGER_LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise InvalidRecipe(f"{name} must be an integer from {low} to {high}, not {value!r}", param=name)
        for name, (least, most) in _NUMBER_LIMITS.items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not isfinite(value) or not least <= value <= most:
                raise InvalidRecipe(f"{name} must be a number from {least} to {most}, not {value!r}", param=name)
        if self.warmup_steps >= self.max_steps:
            raise InvalidRecipe(
                f"warmup_steps ({self.warmup_steps}) must be less than max_steps ({self.max_steps})",
                param="warmup_steps",
            )
        if not isinstance(self.init_text, str) or len(self.init_text) > _INIT_TEXT_CHARACTERS:
            raise InvalidRecipe(
                f"init_text must be text of at most {_INIT_TEXT_CHARACTERS} characters", param="init_text"
            )

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)
