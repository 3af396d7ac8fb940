"""The engine's face: token ids in, token ids out.

`Engine` is small enough to be implemented over HTTP by another backend; `app.engine.local` has ours.
Nothing here knows about text, HTTP or the registry.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from app.errors import InvalidRequest
from app.soft_prompt import SoftPrompt

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort"]
MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. The defaults switch every filter, penalty and report off; `temperature == 0` is greedy.

    Penalties and `logit_bias` act on the logits before temperature and filters, in the order: `repetition_penalty`
    (Keskar et al. 2019, over prompt text and answer), `presence_penalty` and `frequency_penalty` (OpenAI, over the
    answer), `logit_bias`, `min_tokens`. Virtual tokens are never counted as text. Then `temperature`, `top_k`,
    `top_p` (Holtzman et al. 2019), `min_p` (Nguyen et al. 2024).
    """

    max_tokens: int = 16  # 0: compute the prompt only, for its log-probabilities
    min_tokens: int = 0  # no stop token before so many
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None  # report each token's log-probability, and those of so many likeliest ones
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt text

    def __post_init__(self) -> None:
        self._check("max_tokens", self.max_tokens >= (self.prompt_logprobs is None), "at least 1")
        self._check("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens")
        self._check("temperature", 0 <= self.temperature <= 100, "between 0 and 100")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("top_k", self.top_k >= 0, "at least 0")
        self._check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._check("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100")
        self._check("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2")
        self._check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2")
        self._check("logit_bias", all(-100 <= bias <= 100 for bias in self.logit_bias.values()), "-100 to 100 each")
        self._check("seed", self.seed is None or abs(self.seed) <= MAX_SEED, "a 64-bit integer")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            self._check(name, count is None or 0 <= count <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")

    def _check(self, name: str, ok: bool, limit: str) -> None:
        if not ok:
            raise InvalidRequest(f"{name} is {getattr(self, name)!r} but must be {limit}", param=name)


class Constraint(Protocol):
    """What the next token of one generation may be, e.g. by a JSON schema. Called by the engine thread only."""

    def mask(self) -> torch.Tensor:
        """int32 [ceil(vocab_size / 32)] on the CPU: bit i % 32 of word i // 32 is set where token i is allowed."""
        ...

    def accept(self, token_id: int) -> bool:
        """Take a generated token; True when the text is complete and the generation must end."""
        ...


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token in nats, under the model's own distribution: before penalties and temperature."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, best first, with theirs


@dataclass(frozen=True)
class Token:
    """One generated token; the last one of a generation carries the reason it ended.

    A stop token ends the generation and is not part of the answer: then `id` is None. The first one says what is
    known of the prompt text: how many of its tokens had their keys and values in the cache, and, if asked for, the
    log-probability of each; None for the first, whose logits belong to what stands before the text. It also says how
    many seconds the request had waited until the model began with it.
    """

    id: int | None
    finish_reason: FinishReason | None = None
    logprob: Logprob | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    queue_seconds: float = field(default=0.0, compare=False)
    made_at: float = field(default_factory=time.monotonic, compare=False)


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for metrics and readiness. What counts events goes on counting when the engine starts again."""

    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    prefixes: int  # soft prompts, and contexts being scored, resident in the KV cache
    prefix_loads: int  # times a soft prompt's KV was computed or copied in
    prefix_evictions: int
    prefix_bytes: int  # of the KV cache, held by soft prompts
    queried_tokens: int  # of text that was looked for in the cache, once a request
    cached_tokens: int  # of those, found there
    prefixes_in_host_memory: int
    host_bytes: int  # of those
    preemptions: int
    steps: int
    ready: bool  # False while it is down: not started, stopped, or dead and not yet restarted
    given_up: bool  # it has died too often and will not start again
    restarts: int
    seconds_since_progress: float  # of the engine thread, idle turns included


class Generation(Protocol):
    """A generation in flight: an asynchronous iterator of tokens. Closing it is the only way to cancel; idempotent."""

    def __aiter__(self) -> AsyncIterator[Token]: ...

    async def __anext__(self) -> Token: ...

    async def aclose(self) -> None: ...


class Engine(Protocol):
    """One frozen base model behind a queue.

    `generate` and `score` check everything that can be checked before they return (context length, room in the
    queue), so errors precede the first byte. `on_release` is called exactly once, from any thread, when the engine
    no longer needs the soft prompt, whatever ended the request; if the call itself raises, it is not called.
    """

    @property
    def max_model_len(self) -> int:
        """Positions that any request may have: virtual tokens, text and answer."""
        ...

    @property
    def backend(self) -> str:
        """What runs the model, and how, for people."""
        ...

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def check_room(self, digest: str | None, *, ahead: int = 0) -> None:
        """Raise Overloaded or NotReady where a request behind that prompt would, were `ahead` others let in before."""
        ...

    def generate(
        self,
        prompt: SoftPrompt | None,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        constraint: Constraint | None = None,
        salt: str = "",
        on_release: Callable[[], None] | None = None,
    ) -> Generation:
        """Generate behind `prompt` (None: the bare base model).

        Keys and values of text are shared between requests of the same prompt and the same `salt`, and no others.
        Raises ContextLengthExceeded, InvalidRequest, Overloaded, NotReady; while iterating NumericalError,
        EngineFailed.
        """
        ...

    async def score(
        self,
        prompt: SoftPrompt | None,
        token_ids: Sequence[int],
        continuations: Sequence[Sequence[int]],
        *,
        salt: str = "",
        on_release: Callable[[], None] | None = None,
    ) -> list[list[float]]:
        """Log-probability of every token of each continuation after `token_ids`, in nats."""
        ...

    async def load(self, prompt: SoftPrompt) -> None:
        """Make the prompt's keys and values resident now (a real forward pass), e.g. to verify an upload."""
        ...

    async def unload(self, digest: str) -> None:
        """Forget the prefix; rows that use it finish first. Unknown digests are ignored."""
        ...

    def stats(self) -> EngineStats: ...
