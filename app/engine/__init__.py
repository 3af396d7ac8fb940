"""The engine's face: token ids in, token ids out.

`Engine` is small enough to be implemented over HTTP by another backend; `app.engine.local` has ours.
Nothing here knows about text, HTTP or the registry.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from app.errors import InvalidRequest
from app.soft_prompt import SoftPrompt

FinishReason = Literal["stop", "length", "abort"]
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. `temperature == 0` is greedy. `top_k == 0` and `top_p == 1` switch those filters off."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self._check("max_tokens", self.max_tokens >= 1, "at least 1")
        self._check("temperature", 0 <= self.temperature <= 100, "between 0 and 100")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("top_k", self.top_k >= 0, "at least 0")
        self._check("seed", self.seed is None or abs(self.seed) <= MAX_SEED, "a 64-bit integer")

    def _check(self, name: str, ok: bool, limit: str) -> None:
        if not ok:
            raise InvalidRequest(f"{name} is {getattr(self, name)!r} but must be {limit}", param=name)


@dataclass(frozen=True)
class Token:
    """One generated token; the last one of a generation carries the reason it ended.

    A stop token ends the generation and is not part of the answer: then `id` is None.
    """

    id: int | None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for metrics and readiness."""

    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    prefixes: int  # soft prompts, and contexts being scored, resident in the KV cache
    prefix_loads: int  # times a soft prompt's KV was computed or copied in
    prefix_evictions: int
    preemptions: int
    steps: int
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

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def generate(
        self,
        prompt: SoftPrompt | None,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        on_release: Callable[[], None] | None = None,
    ) -> Generation:
        """Generate behind `prompt` (None: the bare base model).

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
