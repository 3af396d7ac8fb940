"""What completions and chat have in common: a prompt's way to answers, and theirs to a reply or a stream."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import anyio.to_thread
from fastapi import Request
from fastapi.responses import Response

from app.access import Caller
from app.answer import Piece
from app.api.answers import Answers
from app.api.concurrency import together
from app.api.deadline import until
from app.api.delivery import deliver
from app.api.deps import State, get_stats
from app.api.generate import MAX_ENTRIES_HERE
from app.api.lease import Lease, leased
from app.api.logprobs import num_entries
from app.api.openai.extras import HEADER, ignored_fields
from app.api.openai.schemas import Sampled
from app.api.reply import identity, prompt_headers
from app.api.sampling import check_logprobs, check_stop_token_ids, constraints, sampling_params
from app.api.schemas import MAX_OUTPUTS, GenerateRequest, as_list
from app.api.stream import Emit
from app.errors import InvalidRequest, SoftpromptError
from app.manifest import Defaults
from app.text import Template

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """What the model reads behind the virtual tokens."""

    token_ids: list[int]
    text: str  # as an echo shows it


class Run(ABC):
    """The answers to one request, under way: `body.num_samples` for each prompt."""

    id_prefix: ClassVar[str]
    kind: ClassVar[str]  # the member `object` of a reply
    chunk_kind: ClassVar[str]
    defaults: ClassVar[Defaults]
    reports_stop_token: ClassVar[bool]  # among the log-probabilities

    def __init__(self, state: State, caller: Caller, lease: Lease, body: Sampled) -> None:
        self._state = state
        self._lease = lease
        self._samples = body.num_samples
        self._n = body.n or 1
        self._body = body
        self._answers = Answers(state, caller, samples=self._samples, cache_salt=body.cache_salt)
        self._prompts: list[Prompt] = []
        made_by = identity(self.id_prefix, state.base.info, [lease])
        self._head = {"id": made_by["id"], "created": int(time.time()), "model": body.model}
        self._head["system_fingerprint"] = made_by["system_fingerprint"]

    @abstractmethod
    async def prompts(self) -> list[Prompt]:
        """The request's, not yet truncated. Raises InvalidRequest."""

    @abstractmethod
    def sampling(self) -> GenerateRequest:
        """The wishes as `/v1/generate` has them, `logprobs` as shown in the reply."""

    @abstractmethod
    def choice(self, index: int, answer: int, piece: Piece) -> dict[str, Any]:
        """Number `index` of a plain reply, made of answer number `answer`."""

    @abstractmethod
    def chunks(self, index: int, piece: Piece, *, begins: bool) -> list[dict[str, Any]]:
        """What a stream says of a piece: members of one event or more."""

    def reply_members(self) -> dict[str, Any]:
        """More of a plain reply than OpenAI's members."""
        return {}

    async def start(self) -> None:
        """Start every answer, or none: the engine may refuse the last one."""
        state, body, samples = self._state, self._body, self._samples
        sampling = self.sampling()
        self._prompts = [self._truncated(prompt) for prompt in await self.prompts()]
        texts = [prompt.token_ids for prompt in self._prompts]
        rooms = [state.engine.max_model_len - self._lease.num_virtual_tokens - len(text) for text in texts]
        check_logprobs(sampling, texts * samples, self.defaults, rooms)
        found = await constraints(state, sampling, len(texts) * samples)
        # The rank among `best_of`, and a stop token's id, come from log-probabilities.
        needs_logprobs = samples > self._n or body.include_stop_str_in_output
        self._answers.read(self._lease, texts)
        async with self._answers.starting():
            for text, room in zip(texts, rooms, strict=True):
                for sample in range(samples):
                    params = sampling_params(sampling, self.defaults, room, state.base.eos_token_ids, sample)
                    if needs_logprobs and params.logprobs is None:
                        params = replace(params, logprobs=0)
                    self._answers.start(
                        self._lease,
                        text,
                        replace(params, prompt_logprobs=sampling.prompt_logprobs),
                        Template(),
                        as_list(body.stop or []),
                        constraint=found.pop(),
                        include_stop=bool(body.include_stop_str_in_output),
                        report_stop_token=self.reports_stop_token,
                        skip_special_tokens=body.skip_special_tokens is not False,
                    )

    async def whole(self) -> dict[str, Any]:
        """The plain reply."""
        pieces = await together(answer.text() for answer in self._answers)
        chosen = list(enumerate(self._best(pieces)))
        count = sum(map(self._num_entries, (answer for _, answer in chosen), (pieces[answer] for _, answer in chosen)))
        choices = await _out_of_the_way(
            count, lambda: [self.choice(index, answer, pieces[answer]) for index, answer in chosen]
        )
        more = self.reply_members()
        return {**self._head, "object": self.kind, "choices": choices, "usage": self._answers.usage(), **more}

    async def stream(self, emit: Emit) -> None:
        """The same in chunks, those of all choices as they come."""
        options = self._body.stream_options
        head = {**self._head, "object": self.chunk_kind}
        with_usage = bool(options and options.include_usage)
        continuous = bool(options and options.continuous_usage_stats)

        def so_far() -> dict[str, Any]:
            return {"usage": self._answers.usage() if continuous else None} if with_usage else {}

        async def relay(index: int) -> None:
            begins = True

            async def deliver(piece: Piece) -> None:
                nonlocal begins
                begun, begins = begins, False
                count = self._num_entries(index, piece)
                for chunk in await _out_of_the_way(count, lambda: self.chunks(index, piece, begins=begun)):
                    await emit({**head, **chunk, **so_far()})

            await self._answers[index].read(deliver)

        await together(relay(index) for index in range(len(self._prompts) * self._samples))
        if with_usage:
            await emit({**head, "choices": [], "usage": self._answers.usage()})

    async def aclose(self) -> None:
        """End what has not ended; the caller pays for what was made by then."""
        await self._answers.aclose()

    def _truncated(self, prompt: Prompt) -> Prompt:
        limit = self._body.truncate_prompt_tokens
        if limit is None:
            return prompt
        if limit == -1:
            new = max(self.sampling().max_tokens or self._body.min_tokens or 0, 1)
            limit = max(self._state.engine.max_model_len - self._lease.num_virtual_tokens - new, 1)
        if limit >= len(prompt.token_ids):
            return prompt
        if limit == 0:
            raise InvalidRequest("truncate_prompt_tokens: 0 leaves nothing", param="truncate_prompt_tokens")
        return Prompt(prompt.token_ids[-limit:], decode(self._state, self._body, prompt.token_ids[-limit:]))

    def _best(self, pieces: Sequence[Piece]) -> Iterator[int]:
        """Numbers of the answers to reply with: of each prompt's the likeliest by token, in that order."""
        for start in range(0, len(pieces), self._samples):
            own = range(start, start + self._samples)
            if self._samples > self._n:
                own = sorted(own, key=lambda answer: -_mean_logprob(pieces[answer]))  # type: ignore[assignment]
            yield from own[: self._n]

    def _num_entries(self, answer: int, piece: Piece) -> int:
        return num_entries(piece.logprobs) + num_entries(self._answers[answer].prompt_logprobs or ())


async def respond(
    run: Callable[[Lease], Run],
    *,
    request: Request,
    state: State,
    caller: Caller,
    deadline: float,
    body: Sampled,
    prompt_field: str,
) -> Response:
    """The reply to `body`, or its stream, by what `run` makes for the version that it names."""
    ignored = ignored_fields(body)
    check_stop_token_ids(body.stop_token_ids or (), state.base.info.vocab_size)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options: only with stream", param="stream_options")
    with until(deadline), _named_here({"input": prompt_field, "prompt_logprobs": "logprobs"}):
        async with leased(state, caller, body.model, get_stats(request), user=body.user) as [lease]:
            running = run(lease)
            await running.start()
        headers = prompt_headers([lease]) | ({HEADER: ", ".join(ignored)} if ignored else {})
        timeout = state.settings.send_timeout
        return await deliver(
            running, request, stream=bool(body.stream), send_timeout=timeout, deadline=deadline, headers=headers
        )


def check_outputs(num_prompts: int, body: Sampled, max_rows: int) -> None:
    """Raises InvalidRequest for more answers than one request may ask for, or than ever find room."""
    count, limit = num_prompts * body.num_samples, min(MAX_OUTPUTS, max_rows)
    if count > limit:
        param = "n" if body.num_samples > 1 else "prompt"
        raise InvalidRequest(f"{param}: {count} answers exceed {limit} in one request", param=param)


def decode(state: State, body: Sampled, token_ids: Sequence[int]) -> str:
    """As an answer is decoded."""
    tokenizer: Any = state.base.tokenizer
    skip = body.skip_special_tokens is not False
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    return text


@contextmanager
def _named_here(names: Mapping[str, str]) -> Iterator[None]:
    """Errors speak of parameters by the names that they have in this request."""
    try:
        yield
    except SoftpromptError as error:
        old = error.param
        if old is not None and old in names:
            error.param = names[old]
            if error.message.startswith((f"{old}: ", f"{old}[")):
                error.message = names[old] + error.message.removeprefix(old)
        raise


def _mean_logprob(piece: Piece) -> float:
    if not piece.logprobs:
        return -math.inf
    return math.fsum(found.logprob for found in piece.logprobs) / len(piece.logprobs)


async def _out_of_the_way(count: int, make: Callable[[], T]) -> T:
    """In a thread if `count` log-probabilities are many."""
    return make() if count <= MAX_ENTRIES_HERE else await anyio.to_thread.run_sync(make)
