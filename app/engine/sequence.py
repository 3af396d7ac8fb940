"""One sequence in flight: what the model has to see, position by position, and how far it has come with it.

Positions count virtual tokens: with n virtual tokens, text token i stands at position n + i. There are no phases:
`num_computed_tokens` chases the number of tokens the model has to see, be it a long prompt or the last token.
"""

from __future__ import annotations

import hashlib
import random
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app.engine import Constraint, Logprob, SamplingParams, Token

if TYPE_CHECKING:
    from app.engine.block_manager import Prefix
    from app.engine.forward import Inputs
    from app.soft_prompt import SoftPrompt


@dataclass(eq=False)
class Sequence:
    """A row of the batch. Only the engine thread touches one after it was handed over."""

    token_ids: list[int]
    prompt: SoftPrompt | None = None
    salt: str = ""  # text is shared between requests of the same salt only
    num_computed_tokens: int = 0  # positions whose keys and values are in `block_table`
    block_table: list[int] = field(default_factory=list)
    prefix: Prefix | None = None  # in use while the sequence holds blocks
    names: list[bytes] = field(default_factory=list)  # of the full blocks of text, as far as they were needed
    created_at: float = field(default_factory=time.monotonic, init=False)
    queue_seconds: float | None = field(default=None, init=False)  # until it was admitted for the first time

    @property
    def num_virtual_tokens(self) -> int:
        return self.prompt.num_virtual_tokens if self.prompt else 0

    @property
    def num_tokens(self) -> int:
        """Positions that the model has to see before it can go on."""
        return self.num_virtual_tokens + len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def context_key(self) -> str | None:
        """Name of a longer prefix than the soft prompt to start from, if it is resident."""
        return None

    @property
    def num_shared_tokens(self) -> int:
        """Positions whose text others may have too, so that the full blocks of it are worth finding."""
        return 0

    @property
    def reads_cached_text(self) -> bool:
        return self.num_shared_tokens > 0

    @property
    def first_needed_position(self) -> int:
        """It has to be computed, whatever is known of the text: its logits are wanted."""
        return self.num_tokens - 1

    def inputs(self, start: int, end: int) -> Inputs:
        """What the model reads at positions [start, end): token ids, or embeddings."""
        return self.token_ids[start - self.num_virtual_tokens : end - self.num_virtual_tokens]

    def block_names(self, first: int, end: int, block_size: int) -> list[bytes]:
        """Names of the blocks [first, end), which text fills; each hashes all that stands up to its end.

        The chain starts from the prompt's digest and the salt, told apart by their lengths, so that no two prompts,
        versions or tenants can meet in one name.
        """
        skipped = self.num_virtual_tokens // block_size
        while skipped + len(self.names) < end:
            index = skipped + len(self.names)
            start = max(index * block_size - self.num_virtual_tokens, 0)
            text = array("q", self.token_ids[start : (index + 1) * block_size - self.num_virtual_tokens])
            self.names.append(hashlib.sha256(self._parent_name() + text.tobytes()).digest())
        return self.names[first - skipped : end - skipped]

    def _parent_name(self) -> bytes:
        if self.names:
            return self.names[-1]
        digest, salt = (self.prompt.digest if self.prompt else "").encode(), self.salt.encode()
        return b"%d:%d:%s%s" % (len(digest), len(salt), digest, salt)

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
    constraint: Constraint | None = None
    emit: Callable[[Token | Exception], None] = lambda _: None
    num_prompt_tokens: int = field(init=False)
    num_cached_tokens: int | None = None  # of the prompt text, known once it was admitted
    prompt_logprobs: list[Logprob] = field(default_factory=list)  # of the text's tokens from the second on
    _random: random.Random = field(init=False)
    _draw: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        # One generator a sequence: the same seed draws the same numbers whatever else is in the batch, and
        # a preempted sequence goes on where it was.
        # As text, because random.Random takes an integer's absolute value.
        self._random = random.Random(None if self.params.seed is None else str(self.params.seed))

    @property
    def num_shared_tokens(self) -> int:
        return self.num_tokens

    @property
    def reads_cached_text(self) -> bool:
        """Log-probabilities of the prompt need every position computed."""
        return self.params.prompt_logprobs is None

    @property
    def draw(self) -> float:
        """Uniform in [0, 1): the next token's, the same however often its step is tried."""
        if self._draw is None:
            self._draw = self._random.random()
        return self._draw

    def num_logits(self, start: int, end: int) -> int:
        if self.params.prompt_logprobs is None or start >= self.num_virtual_tokens + self.num_prompt_tokens:
            return int(end == self.num_tokens)
        return max(0, end - max(start, self.num_virtual_tokens + len(self.prompt_logprobs)))

    def prompt_targets(self, start: int, end: int) -> list[int]:
        """Prompt tokens that the positions in [start, end) with logits predict; the answer's first is not one."""
        first = end - self.num_logits(start, end) - self.num_virtual_tokens + 1
        return self.token_ids[first : min(end - self.num_virtual_tokens + 1, self.num_prompt_tokens)]

    def append(self, token_id: int, logprob: Logprob | None) -> bool:
        """Take a sampled token; True when the generation has ended. A constraint's exception is the caller's."""
        self._draw = None
        if token_id in self.params.stop_token_ids:
            self._emit(None, "stop", logprob)
            return True
        complete = self.constraint is not None and self.constraint.accept(token_id)
        self.token_ids.append(token_id)
        full = len(self.token_ids) - self.num_prompt_tokens >= self.params.max_tokens
        self._emit(token_id, "stop" if complete else "length" if full else None, logprob)
        return complete or full

    def finish_without_answer(self) -> None:
        """The prompt is computed and no token was asked for."""
        self._emit(None, "length", None)

    def _emit(self, token_id: int | None, finish_reason: Any, logprob: Logprob | None) -> None:
        if len(self.token_ids) - self.num_prompt_tokens <= (token_id is not None):  # the first
            found = (None, *self.prompt_logprobs) if self.params.prompt_logprobs is not None else None
            waited = self.queue_seconds or 0.0
            self.emit(Token(token_id, finish_reason, logprob, self.num_cached_tokens or 0, found, waited))
        else:
            self.emit(Token(token_id, finish_reason, logprob))

    def fail(self, error: Exception) -> None:
        self.emit(error)


@dataclass(eq=False)
class PromptSequence(Sequence):
    """A soft prompt's embeddings on their way through the model, once; nobody waits for it but its own requests."""

    @property
    def num_virtual_tokens(self) -> int:
        return 0  # they are what it computes, not what it stands behind

    @property
    def num_tokens(self) -> int:
        assert self.prompt is not None
        return self.prompt.num_virtual_tokens

    def inputs(self, start: int, end: int) -> Inputs:
        assert self.prompt is not None
        return self.prompt.tensor[start:end]

    def num_logits(self, start: int, end: int) -> int:
        return 0


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

    @property
    def num_shared_tokens(self) -> int:
        return self.num_tokens

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
    def num_shared_tokens(self) -> int:
        """If its context was evicted, the first continuation computes it again and the others find it."""
        return self.first_scored_position

    @property
    def first_needed_position(self) -> int:
        return self.first_scored_position

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
