"""POST /v1/generate: text behind a task's soft prompt, at once or as it is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Body, Request
from fastapi.responses import Response

from app.access import Caller
from app.answer import Answer, Piece
from app.api.access import CallerDep
from app.api.answers import Answers
from app.api.body import JsonRoute
from app.api.concurrency import together
from app.api.deadline import DeadlineDep, until
from app.api.delivery import deliver
from app.api.deps import State, StateDep, get_stats
from app.api.lease import Lease, leased
from app.api.logprobs import logprob_entries, num_entries
from app.api.reply import encode, identity, prompt_headers
from app.api.sampling import check_logprobs, check_request, constraints, sampling_params
from app.api.schemas import GenerateReply, GenerateRequest, as_list
from app.api.stream import Emit
from app.errors import InvalidRequest
from app.manifest import Defaults
from app.text import Template

MAX_ENTRIES_HERE = 100  # log-probabilities; more are put together in a thread

router = APIRouter(route_class=JsonRoute, tags=["generation"])

_EXAMPLES: dict[str, Any] = {
    "one": {
        "summary": "One input for a task",
        "value": {"task": "sentiment", "input": "a gripping film from start to finish", "max_tokens": 4},
    },
    "several": {
        "summary": "Several inputs for one version, sampled",
        "value": {
            "task": "sentiment:7",
            "input": ["a gripping film", "two hours I will not get back"],
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 1,
        },
    },
    "stream": {
        "summary": "The bare base model, streamed",
        "value": {"input": "The capital of France is", "max_tokens": 16, "stop": ["\n"], "stream": True},
    },
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answers. With `stream`: an event per piece of text, one with `usage`, `[DONE]`; the first "
        "and the one with `usage` say what made them.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post("/v1/generate", response_model=GenerateReply, responses=_RESPONSES)
async def generate(
    request: Request,
    body: Annotated[GenerateRequest, Body(openapi_examples=_EXAMPLES)],
    state: StateDep,
    deadline: DeadlineDep,
    caller: CallerDep,
) -> Response:
    """Generate text behind a task's soft prompt, or by the bare base model.

    An ensemble answers by majority: the text that most members give, of those the one whose first giver is named
    first (Lester et al. 2021, section 6).
    """
    check_request(body, state.base.info.vocab_size, state.max_rows)
    if isinstance(body.task, list) and len(body.task) > 1:
        _check_ensemble(body)
    with until(deadline):
        async with leased(state, caller, body.task, get_stats(request), user=body.user) as leases:
            run = await _Run.start(state, caller, leases, body)
        headers, timeout = prompt_headers(leases), state.settings.send_timeout
        return await deliver(run, request, stream=body.stream, send_timeout=timeout, deadline=deadline, headers=headers)


def _check_ensemble(body: GenerateRequest) -> None:
    asked = {
        "n": body.n > 1,
        "logprobs": body.logprobs is not None,
        "prompt_logprobs": body.prompt_logprobs is not None,
        "stream": body.stream,
    }
    for name, given in asked.items():
        if given:
            raise InvalidRequest(f"{name}: an ensemble gives one combined answer, without it", param=name)


class _Run:
    """The answers to one request, under way: for each member of an ensemble, n for each input."""

    def __init__(self, state: State, caller: Caller, leases: Sequence[Lease], body: GenerateRequest) -> None:
        self._tokenizer = state.base.tokenizer
        self._token_texts = state.token_texts
        self._identity = identity("gen", state.base.info, leases)
        self._with_logprobs = body.logprobs is not None
        self._num_outputs = len(as_list(body.input)) * body.n
        self._samples = body.n
        self._of_list = isinstance(body.input, list)
        self._num_members = len(leases)
        self._answers = Answers(state, caller, samples=body.n, cache_salt=body.cache_salt)

    @classmethod
    async def start(cls, state: State, caller: Caller, leases: Sequence[Lease], body: GenerateRequest) -> _Run:
        """Start every answer, or none: the engine may refuse the last one."""
        run = cls(state, caller, leases, body)
        found = await constraints(state, body, len(leases) * run._num_outputs)
        async with run._answers.starting():
            for lease in leases:
                await run._start(state, lease, body, found)
        return run

    async def _start(self, state: State, lease: Lease, body: GenerateRequest, found: list[Any]) -> None:
        manifest = lease.version.manifest if lease.version and not body.raw else None
        template = manifest.parsed_template if manifest else Template()
        defaults = manifest.defaults if manifest else Defaults()
        stop = as_list(body.stop) if body.stop is not None else defaults.stop or []
        texts = await encode(self._tokenizer, [template.prompt(text) for text in as_list(body.input)])
        self._answers.read(lease, texts)
        rooms = [state.engine.max_model_len - lease.num_virtual_tokens - len(text) for text in texts]
        check_logprobs(body, texts, defaults, rooms)
        for text, room in zip(texts, rooms, strict=True):
            for sample in range(body.n):
                params = sampling_params(body, defaults, room, state.base.eos_token_ids, sample)
                self._answers.start(lease, text, params, template, stop, constraint=found.pop())

    async def whole(self) -> dict[str, Any]:
        """The plain reply."""
        pieces = await together(answer.text() for answer in self._answers)
        if self._num_members > 1:
            outputs = [
                self._place(index) | _majority(pieces[index :: self._num_outputs]) for index in range(self._num_outputs)
            ]
        else:
            outputs = await self._outputs(dict(enumerate(pieces)), first=True)
        return {**self._identity, "outputs": outputs, "usage": self._answers.usage()}

    async def stream(self, emit: Emit) -> None:
        """The same in pieces, those of all inputs as they come. What made them is said first and last."""
        made_by = self._identity

        async def relay(index: int, answer: Answer) -> None:
            begun = False

            async def deliver(piece: Piece) -> None:
                nonlocal begun, made_by
                [output] = await self._outputs({index: piece}, first=not begun)
                event = {**made_by, **output}
                begun, made_by = True, {"id": self._identity["id"]}
                await emit(event)

            await answer.read(deliver)

        await together(relay(index, answer) for index, answer in enumerate(self._answers))
        await emit({**self._identity, "usage": self._answers.usage()})

    async def aclose(self) -> None:
        """End what has not ended; the caller pays for what was made by then."""
        await self._answers.aclose()

    async def _outputs(self, pieces: Mapping[int, Piece], *, first: bool) -> list[dict[str, Any]]:
        """`first`: with what is said once, about the input."""

        def make() -> list[dict[str, Any]]:
            return [self._output(index, piece, first=first) for index, piece in pieces.items()]

        count = sum(num_entries(piece.logprobs) for piece in pieces.values())
        if first:
            count += sum(num_entries(self._answers[index].prompt_logprobs or ()) for index in pieces)
        return make() if count <= MAX_ENTRIES_HERE else await anyio.to_thread.run_sync(make)

    def _output(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        output = {**self._place(index), "text": piece.text, "finish_reason": piece.finish_reason}
        if self._with_logprobs:
            output["logprobs"] = logprob_entries(self._token_texts, piece.logprobs)
        prompt = self._answers[index].prompt_logprobs
        if first and prompt is not None:
            output["prompt_logprobs"] = logprob_entries(self._token_texts, prompt)
        return output

    def _place(self, index: int) -> dict[str, Any]:
        """Its number, and that of its input where there is a list of them."""
        return {"index": index} | ({"input_index": index // self._samples} if self._of_list else {})


def _majority(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The answer that most members gave; Counter keeps the order of first appearance among equals."""
    ((text, votes),) = Counter(piece.text for piece in pieces).most_common(1)
    reason = next(piece.finish_reason for piece in pieces if piece.text == text)
    return {"text": text, "finish_reason": reason, "votes": votes}
