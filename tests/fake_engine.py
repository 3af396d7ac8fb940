"""An engine without a model: it answers from a script, and counts what it was asked, what was closed and released."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from app.engine import Constraint, EngineStats, FinishReason, Logprob, SamplingParams, Token
from app.errors import NotReady
from app.soft_prompt import SoftPrompt


@dataclass
class Call:
    """One call of `generate` or `score`, and what became of it."""

    prompt: SoftPrompt | None
    token_ids: list[int]
    params: SamplingParams = SamplingParams()
    continuations: list[list[int]] = field(default_factory=list)
    endless: bool = False
    constraint: Constraint | None = None
    salt: str = ""
    taken: int = 0  # tokens that were read
    closed: bool = False
    releases: int = 0


class FakeGeneration(AsyncIterator[Token]):
    def __init__(self, engine: FakeEngine, call: Call, on_release: Callable[[], None] | None) -> None:
        self._engine = engine
        self._call = call
        self._on_release = on_release
        self._ended = False

    async def __anext__(self) -> Token:
        if self._ended:
            raise StopAsyncIteration
        engine, call = self._engine, self._call
        await asyncio.sleep(engine.delay)
        if engine.stopped:
            self._end()
            raise NotReady("the engine has stopped")
        if engine.fail_after is not None and call.taken >= engine.fail_after[0]:
            self._end()
            raise engine.fail_after[1]
        script = engine.answers.get(call.prompt.digest if call.prompt else "", engine.answer)
        position = call.taken % len(script) if call.endless else call.taken
        call.taken += 1
        finish: FinishReason | None = None
        if not call.endless and position == len(script):
            finish = "stop"
        elif call.taken == call.params.max_tokens and not call.endless:
            finish = "length"
        if finish:
            self._end()
        first = call.taken == 1
        logprobs: tuple[Logprob | None, ...] | None = None
        if first and call.params.prompt_logprobs is not None:
            logprobs = (None, *(Logprob(token_id, engine.logprob / 2) for token_id in call.token_ids[1:]))
        if finish == "stop":
            return Token(None, finish, None, engine.num_cached_tokens * first, logprobs)
        chosen = script[position]
        logprob = (
            None
            if call.params.logprobs is None
            else Logprob(chosen, engine.logprob, ((chosen, engine.logprob), (5, -1.5)))
        )
        return Token(chosen, finish, logprob, engine.num_cached_tokens * first, logprobs)

    async def aclose(self) -> None:
        if not self._ended:
            self._call.closed = True
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._engine.release(self._call, self._on_release)


class FakeEngine:
    """Implements `app.engine.Engine`. Set the fields to make it slow, endless or broken."""

    def __init__(self, answer: Sequence[int]) -> None:
        self.answer = list(answer)  # token ids of every answer, then a stop token
        self.answers: dict[str, list[int]] = {}  # of some prompts, by digest
        self.num_cached_tokens = 0
        self.logprob = -0.5  # of every token of an answer; half of it, of every token of a prompt
        self.delay = 0.0  # seconds before each token and each score
        self.endless = False
        self.fail_after: tuple[int, Exception] | None = None
        self.refuse: tuple[int, Exception] | None = None  # from which call on
        self.load_error: Exception | None = None
        self.max_model_len = 512
        self.backend = "nothing"
        self.seconds_since_progress = 0.0
        self.ready = True
        self.given_up = False
        self.restarts = 0
        self.logprobs: Callable[[list[int]], list[float]] = lambda tokens: [-0.5] * len(tokens)
        self.scale: Callable[[Call], float] = lambda call: 1.0  # of those, by prompt or text
        self.calls: list[Call] = []
        self.loaded: list[str] = []
        self.unloaded: list[str] = []
        self.stopped = 0

    def start(self) -> None: ...

    def stop(self) -> None:
        self.stopped += 1

    def check_room(self, digest: str | None, *, ahead: int = 0) -> None: ...

    def generate(
        self,
        prompt: SoftPrompt | None,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        constraint: Constraint | None = None,
        salt: str = "",
        on_release: Callable[[], None] | None = None,
    ) -> FakeGeneration:
        call = Call(prompt, list(token_ids), params, endless=self.endless, constraint=constraint, salt=salt)
        self._admit(call)
        return FakeGeneration(self, call, on_release)

    async def score(
        self,
        prompt: SoftPrompt | None,
        token_ids: Sequence[int],
        continuations: Sequence[Sequence[int]],
        *,
        salt: str = "",
        on_release: Callable[[], None] | None = None,
    ) -> list[list[float]]:
        call = Call(prompt, list(token_ids), salt=salt, continuations=[list(tokens) for tokens in continuations])
        self._admit(call)
        try:
            await asyncio.sleep(self.delay)
            if self.fail_after is not None:
                raise self.fail_after[1]
            scale = self.scale(call)
            return [[scale * logprob for logprob in self.logprobs(tokens)] for tokens in call.continuations]
        except asyncio.CancelledError:
            call.closed = True
            raise
        finally:
            self.release(call, on_release)

    async def load(self, prompt: SoftPrompt) -> None:
        if self.load_error is not None:
            raise self.load_error
        self.loaded.append(prompt.digest)

    async def unload(self, digest: str) -> None:
        self.unloaded.append(digest)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.calls) - sum(call.releases for call in self.calls),
            waiting=0,
            kv_blocks_total=8,
            kv_blocks_used=0,
            prefixes=len(self.loaded),
            prefix_loads=len(self.loaded),
            prefix_evictions=0,
            prefix_bytes=0,
            queried_tokens=0,
            cached_tokens=0,
            prefixes_in_host_memory=0,
            host_bytes=0,
            preemptions=0,
            steps=0,
            ready=self.ready and not self.stopped,
            given_up=self.given_up,
            restarts=self.restarts,
            seconds_since_progress=self.seconds_since_progress,
        )

    def release(self, call: Call, on_release: Callable[[], None] | None) -> None:
        call.releases += 1
        if on_release is not None:
            on_release()

    def _admit(self, call: Call) -> None:
        if self.refuse is not None and len(self.calls) >= self.refuse[0]:
            raise self.refuse[1]
        self.calls.append(call)
