"""The answers to one request, under way: started all or none, ended together, paid for once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio

from app.access import Caller
from app.answer import Answer
from app.api.deps import State
from app.api.lease import Lease
from app.api.reply import about_input, usage
from app.api.request_stats import Unread
from app.engine import Constraint, SamplingParams
from app.text import Template


class Answers:
    """For each text behind each lease `samples` answers, in that order."""

    def __init__(self, state: State, caller: Caller, *, samples: int, cache_salt: str | None) -> None:
        self._state = state
        self._caller = caller
        self._samples = samples
        self._salt = caller.salt(cache_salt)
        self._to_pay = False  # once every answer has started, and until it is paid
        self._work: list[tuple[Lease, Sequence[Sequence[int]]]] = []  # the texts behind each lease, as token ids
        self._answers: list[Answer] = []
        self._unread = Unread(0)  # of the input whose answers are being started
        self._leases: list[Lease] = []  # of each answer

    def __getitem__(self, index: int) -> Answer:
        return self._answers[index]

    def __iter__(self) -> Iterator[Answer]:
        return iter(self._answers)

    @asynccontextmanager
    async def starting(self) -> AsyncIterator[None]:
        """Start them inside: if one cannot be, those before it are ended."""
        try:
            yield
        except BaseException:
            await self.aclose()
            raise
        self._to_pay = True

    def read(self, lease: Lease, texts: Sequence[Sequence[int]]) -> None:
        """These texts are read behind the lease, each once however many samples it has."""
        self._work.append((lease, texts))
        if self._state.settings.log_prompts:
            tokenizer: Any = self._state.base.tokenizer
            lease.stats.prompts += [tokenizer.decode(text) for text in texts]

    def start(
        self,
        lease: Lease,
        text: Sequence[int],
        params: SamplingParams,
        template: Template,
        stop: Sequence[str],
        *,
        constraint: Constraint | None,
        **options: Any,
    ) -> None:
        """The next answer; `options` are `Answer`'s. Raises what `Engine.generate` does, naming the text of several."""
        num_texts = len(self._work[-1][1])
        number = len(self._answers) // self._samples % num_texts
        with about_input(number, num_texts):
            generation = lease.generate(self._state.engine, text, params, constraint=constraint, salt=self._salt)
        if len(self._answers) % self._samples == 0:
            self._unread = Unread(len(text))
        self._answers.append(
            Answer(
                generation,
                self._state.base.tokenizer,
                template,
                stop,
                min_tokens=params.min_tokens,
                on_token=lease.stats.clock(lease.version, self._unread),
                **options,
            ),
        )
        self._leases.append(lease)

    def usage(self) -> dict[str, Any]:
        """By now."""
        generated = sum(answer.num_tokens for answer in self._answers)
        # The first sample's of each input, as the input counts once: the others find what that one computed.
        cached = sum(answer.num_cached_tokens for answer in self._answers[:: self._samples])
        return usage(self._work, num_generated=generated, num_cached=cached)

    async def aclose(self) -> None:
        """End what has not ended; the caller pays for what was made by then."""
        try:
            with anyio.CancelScope(shield=True):
                for answer in self._answers:
                    await answer.aclose()
        finally:
            if self._to_pay:
                self._to_pay = False
                self._caller.spend(self._num_made())
                self._tell()

    def _tell(self) -> None:
        for lease, answer in zip(self._leases, self._answers, strict=True):
            if answer.finish_reason in ("stop", "length"):
                lease.stats.finishes(lease.version, answer.finish_reason)
                lease.stats.is_answered = len(lease.stats.finish_reasons) == len(self._answers)

    def _num_made(self) -> int:
        """Tokens that were read or written: an input that only waited was neither."""
        texts = [text for _, texts in self._work for text in texts]
        size = self._samples
        samples = [self._answers[start : start + size] for start in range(0, len(self._answers), size)]
        num_read = sum(
            len(text)
            for text, answers in zip(texts, samples, strict=True)
            if any(answer.has_begun for answer in answers)
        )
        return num_read + sum(answer.num_tokens for answer in self._answers)
