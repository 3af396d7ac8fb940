"""The recipe of one training run: a frozen value, checked when it is built."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal, get_args

from app.errors import InvalidRecipe

MethodName = Literal[
    "prompt_tuning", "p_tuning", "prefix_tuning", "cartridge", "multitask_prompt_tuning", "cpt"
]  # app.train.methods has one file for each
Init = Literal["text", "labels", "vocabulary", "prompt"]
Encoder = Literal["mlp", "lstm"]
Precision = Literal["auto", "float32"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
INITS: tuple[Init, ...] = get_args(Init)
KV_METHODS: tuple[MethodName, ...] = ("prefix_tuning", "cartridge")
RESIDUAL_METHODS: tuple[MethodName, ...] = ("prompt_tuning", "prefix_tuning")
# The best of a few on SmolLM2-135M after 30 steps, short texts by sentiment; a cartridge has prefix tuning's.
DEFAULT_LEARNING_RATES: dict[MethodName, float] = {
    "prompt_tuning": 0.2,
    "p_tuning": 0.01,
    "prefix_tuning": 0.02,
    "cartridge": 0.02,
    "multitask_prompt_tuning": 0.2,
    "cpt": 0.2,
}

_CHOICES = {
    "method": METHODS,
    "init": (None, *INITS),
    "encoder": get_args(Encoder),
    "precision": get_args(Precision),
    "residual": (False, True),
}
_INTEGER_LIMITS = {
    "num_virtual_tokens": (1, 1024),
    "batch_size": (1, 1024),
    "max_steps": (1, 1_000_000),
    "warmup_steps": (0, 1_000_000),
    "eval_every": (1, 1_000_000),
    "eval_rows": (1, 1_000_000),
    "checkpoint_every": (1, 1_000_000),
    "patience": (1, 1_000_000),
    "average_steps": (1, 1_000_000),
    "seed": (0, 2**63 - 1),
    "max_length": (2, 1_048_576),
    "encoder_hidden_size": (1, 8192),
    "residual_size": (1, 8192),
    "num_ranks": (1, 64),
    "num_frozen_tokens": (0, 1023),
}
_NUMBER_LIMITS = {
    "learning_rate": (1e-8, 10.0),
    "weight_decay": (0.0, 1.0),
    "max_grad_norm": (1e-6, 1e6),
    "budget_seconds": (1.0, 31_536_000.0),
    "cpt_epsilon": (1e-6, 1e3),
}
_INIT_TEXT_CHARACTERS = 10_000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one soft prompt is trained, by default with prompt tuning (Lester et al. 2021, arXiv:2104.08691).

    `learning_rate` is in units of what is trained: for virtual tokens the base's embedding RMS, for keys and values
    their RMS in each layer. One AdamW step moves an element by about `learning_rate` times its typical size, so one
    value serves bases whose embeddings differ in scale by orders of magnitude. None is the method's default, "auto"
    tries a few on the rows. `max_grad_norm` is in the inverse of those units.

    Raises InvalidRecipe, naming the field, its value and the limit.
    """

    method: MethodName = "prompt_tuning"
    num_virtual_tokens: int = 20  # for cpt the most: its context may be shorter
    init: Init | None = None  # None: the prompt that is given, else `init_text`, else the vocabulary
    init_text: str = ""
    residual: bool = False  # the prompt is P + MLP(P) while it is trained (Razdaibiedina et al. 2023)
    # None becomes DEFAULT_LEARNING_RATES[method]
    learning_rate: float | Literal["auto"] | None = None
    batch_size: int = 16  # rows
    max_steps: int = 300
    warmup_steps: int = 15
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    budget_seconds: float | None = None  # of training and validation: fewer than `max_steps` steps if need be
    eval_every: int = 25  # steps
    eval_rows: int = 200  # validation rows measured each time, a seeded sample
    checkpoint_every: int = 10  # steps
    patience: int = 6  # evaluations without improvement before stopping
    average_steps: int = 100  # what is validated and kept is a mean over about so many steps; 1: the last step's
    seed: int = 0
    # Of products with float32 weights; "auto": bfloat16 on a CPU that has it (app.train.precision).
    precision: Precision = "auto"
    max_length: int = 512  # tokens of prompt and answer, virtual tokens not counted
    encoder: Encoder = "mlp"  # of p_tuning
    encoder_hidden_size: int = 256  # of p_tuning
    residual_size: int = 128  # width of the residual's bottleneck
    num_ranks: int = 1  # of multitask_prompt_tuning: rank of a task's matrix
    num_frozen_tokens: int = 1  # of a cartridge: the first ones, an attention sink that training leaves alone
    cpt_epsilon: float = 0.5  # how far cpt moves a token: L2 norm, in that of a typical embedding

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed or (name == "residual" and type(value) is not bool):
                known = ", ".join(map(str, allowed))
                raise InvalidRecipe(f"{name} must be one of {known}, not {value!r}", param=name)
        for name, (low, high) in _INTEGER_LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise InvalidRecipe(f"{name} must be an integer from {low} to {high}, not {value!r}", param=name)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", DEFAULT_LEARNING_RATES[self.method])
        for name, (least, most) in _NUMBER_LIMITS.items():
            value = getattr(self, name)
            if (name, value) in (("learning_rate", "auto"), ("budget_seconds", None)):
                continue
            if type(value) not in (int, float) or not isfinite(value) or not least <= value <= most:
                raise InvalidRecipe(f"{name} must be a number from {least} to {most}, not {value!r}", param=name)
        if not isinstance(self.init_text, str) or len(self.init_text) > _INIT_TEXT_CHARACTERS:
            raise InvalidRecipe(
                f"init_text must be text of at most {_INIT_TEXT_CHARACTERS} characters", param="init_text"
            )
        self._check_together()

    def _check_together(self) -> None:
        if self.warmup_steps >= self.max_steps:
            raise InvalidRecipe(
                f"warmup_steps ({self.warmup_steps}) must be less than max_steps ({self.max_steps})",
                param="warmup_steps",
            )
        if self.init == "text" and not self.init_text and self.method != "cpt":
            raise InvalidRecipe('init "text" needs an init_text', param="init_text")
        if self.init not in (None, "text") and self.init_text:
            raise InvalidRecipe(f"init_text is for init text, not for {self.init}", param="init_text")
        if self.residual and self.method not in RESIDUAL_METHODS:
            raise InvalidRecipe(
                f"residual is for {' and '.join(RESIDUAL_METHODS)}, not for {self.method}", param="residual"
            )
        if self.method == "cpt" and self.init not in (None, "text"):
            raise InvalidRecipe("cpt starts from a text and training rows, so init must be text", param="init")
        if self.method == "cartridge" and self.num_frozen_tokens >= self.num_virtual_tokens:
            raise InvalidRecipe(
                f"num_frozen_tokens ({self.num_frozen_tokens}) must be less than num_virtual_tokens "
                f"({self.num_virtual_tokens})",
                param="num_frozen_tokens",
            )

    @property
    def start(self) -> Init:
        """Where the prompt begins unless one is given."""
        return self.init or ("text" if self.init_text or self.method == "cpt" else "vocabulary")

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)
