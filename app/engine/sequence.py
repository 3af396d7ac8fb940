"""One sequence in flight: token ids behind a soft prompt, and how far the model has come with them.

Positions count virtual tokens: with n virtual tokens, text token i stands at position n + i. There are no phases:
`num_computed_tokens` chases the number of tokens the model has to see, be it a long prompt or the last token.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from app.engine import SamplingParams, Token

if TYPE_CHECKING:
    from app.engine.block_manager import Prefix
    from app.soft_prompt import SoftPrompt


@dataclass(eq=False)
class Sequence:
    """A row of the batch. Only the engine thread touches one after it was handed over."""

    token_ids: list[int]
    prompt: SoftPrompt | None = None
    num_computed_tokens: int = 0  # positions whose keys and values are in `block_table`
    block_table: list[int] = field(default_factory=list)
    prefix: Prefix | None = None  # in use while the sequence holds blocks

    @property
    def num_virtual_tokens(self) -> int:
        return self.prompt.num_virtual_tokens if self.prompt else 0

    @property
    def num_tokens(self) -> int:
        """Positions that the model has to see before it can go on."""
        return self.num_virtual_tokens + len(self.token_ids)

    @property
    def context_key(self) -> str | None:
        """Name of a longer prefix than the soft prompt to start from, if it is resident."""
        return None

    def num_logits(self, start: int, end: int) -> int:
        """How many of the last positions in [start, end) need logits."""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """Tell the waiting client, once."""
        raise NotImplementedError


@dataclass(eq=False)
class GenerationSequence(Sequence):
    """Samples tokens until a stop token or `max_tokens`."""

    params: SamplingParams = field(default_factory=SamplingParams)
    emit: Callable[[Token | Exception], None] = lambda _: None
    num_prompt_tokens: int = field(init=False)
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        # One generator a sequence: the same seed draws the same numbers whatever else is in the batch, and
        # a preempted sequence goes on where it was.
        # As text, because random.Random takes an integer's absolute value.
        self.random = random.Random(None if self.params.seed is None else str(self.params.seed))

    def num_logits(self, start: int, end: int) -> int:
        return int(end == self.num_tokens)

    def append(self, token_id: int) -> bool:
        """Take a sampled token; True when the generation has ended."""
        if token_id in self.params.stop_token_ids:
            self.emit(Token(None, "stop"))
            return True
        self.token_ids.append(token_id)
        finished = len(self.token_ids) - self.num_prompt_tokens >= self.params.max_tokens
        self.emit(Token(token_id, "length" if finished else None))
        return finished

    def fail(self, error: Exception) -> None:
        self.emit(error)


@dataclass(eq=False)
class Score:
    """One scoring request: several continuations of one context, which is computed once."""

    key: str  # names the context's prefix
    prompt: SoftPrompt | None
    continuations: list[list[int]]
    finish: Callable[[list[list[float]] | Exception], None]
    owner: ContextSequence = field(init=False)  # stands for the whole request
    logprobs: list[list[float]] = field(init=False)
    pending: int = field(init=False)  # continuations not yet complete

    def __post_init__(self) -> None:
        self.logprobs = [[float("nan")] * len(tokens) for tokens in self.continuations]
        self.pending = len(self.continuations)


@dataclass(eq=False)
class ContextSequence(Sequence):
    """The shared part of a scoring request: its last logits score every continuation's first token."""

    score: Score = field(kw_only=True)

    def __post_init__(self) -> None:
        self.score.owner = self

    def num_logits(self, start: int, end: int) -> int:
        return int(end == self.num_tokens)

    def fail(self, error: Exception) -> None:
        self.score.finish(error)


@dataclass(eq=False)
class ContinuationSequence(Sequence):
    """Context plus one continuation; starts from the context's prefix, or from the beginning if that was evicted."""

    score: Score = field(kw_only=True)
    index: int = field(kw_only=True)

    @property
    def num_tokens(self) -> int:
        # The last token is only ever predicted, never fed.
        return super().num_tokens - 1

    @property
    def context_key(self) -> str | None:
        return self.score.key

    @property
    def first_scored_position(self) -> int:
        """The position that predicts the continuation's first token."""
        return self.num_virtual_tokens + len(self.score.owner.token_ids) - 1

    def num_logits(self, start: int, end: int) -> int:
        return max(0, end - max(start, self.first_scored_position))

    def targets(self, start: int, end: int) -> list[int]:
        """Tokens predicted by the positions in [start, end) that need logits."""
        first = max(start, self.first_scored_position) - self.num_virtual_tokens + 1
        return self.token_ids[first : end - self.num_virtual_tokens + 1]

    def fail(self, error: Exception) -> None:
        self.score.finish(error)
