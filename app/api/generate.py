"""POST /v1/generate: text behind a task's soft prompt, at once or as it is written."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse, Response

from app.answer import Answer, Piece
from app.api.body import JsonRoute
from app.api.concurrency import disconnection, first, together
from app.api.deps import State, StateDep
from app.api.lease import Lease, leased
from app.api.reply import encode, identity, prompt_headers, usage
from app.api.schemas import GenerateReply, GenerateRequest, as_list
from app.api.stream import Emit, EventStream
from app.engine import SamplingParams
from app.manifest import Defaults
from app.soft_prompt import BaseInfo
from app.text import Template

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 128

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
        "description": "The answers. With `stream`: an event per piece of text, one with `usage`, `[DONE]`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post("/v1/generate", response_model=GenerateReply, responses=_RESPONSES)
async def generate(
    request: Request, body: Annotated[GenerateRequest, Body(openapi_examples=_EXAMPLES)], state: StateDep
) -> Response:
    """Generate text behind a task's soft prompt, or by the bare base model."""
    async with leased(state, body.task) as lease:
        run = await _Run.start(state, lease, body)
    headers = prompt_headers(lease.version)
    if body.stream:
        timeout = state.settings.send_timeout
        return EventStream(run.stream, run.aclose, send_timeout=timeout, headers=headers)
    try:
        reply = await first(run.whole(), disconnection(request.receive))
    finally:
        await run.aclose()
    return JSONResponse(reply, headers=headers)


class _Run:
    """The answers to one request, under way."""

    def __init__(self, lease: Lease, base: BaseInfo, prompts: list[list[int]]) -> None:
        self._lease = lease
        self._prompts = prompts  # token ids
        self._answers: list[Answer] = []
        self._identity = identity("gen", base, lease.version)

    @classmethod
    async def start(cls, state: State, lease: Lease, body: GenerateRequest) -> _Run:
        """Start every input, or none: the engine may refuse the last one."""
        manifest = lease.version.manifest if lease.version and not body.raw else None
        template = manifest.parsed_template if manifest else Template()
        defaults = manifest.defaults if manifest else Defaults()
        stop = as_list(body.stop) if body.stop is not None else defaults.stop or []
        prompts = await encode(state.base.tokenizer, [template.prompt(text) for text in as_list(body.input)])
        run = cls(lease, state.base.info, prompts)
        try:
            for prompt in prompts:
                room = state.engine.max_model_len - lease.num_virtual_tokens - len(prompt)
                params = _sampling(body, defaults, room, state.base.eos_token_ids)
                generation = lease.generate(state.engine, prompt, params)
                run._answers.append(Answer(generation, state.base.tokenizer, template, stop))
        except BaseException:
            await run.aclose()
            raise
        return run

    async def whole(self) -> dict[str, Any]:
        """The plain reply."""
        pieces = await together(answer.text() for answer in self._answers)
        outputs = [_output(index, piece) for index, piece in enumerate(pieces)]
        return {**self._identity, "outputs": outputs, "usage": self._usage()}

    async def stream(self, emit: Emit) -> None:
        """The same in pieces, those of all inputs as they come."""

        async def relay(index: int, answer: Answer) -> None:
            async def deliver(piece: Piece) -> None:
                await emit({**self._identity, **_output(index, piece)})

            await answer.read(deliver)

        await together(relay(index, answer) for index, answer in enumerate(self._answers))
        await emit({**self._identity, "usage": self._usage()})

    async def aclose(self) -> None:
        for answer in self._answers:
            await answer.aclose()

    def _usage(self) -> dict[str, Any]:
        generated = sum(answer.num_tokens for answer in self._answers)
        return usage(self._lease, self._prompts, generated).model_dump()


def _output(index: int, piece: Piece) -> dict[str, Any]:
    return {"index": index, "text": piece.text, "finish_reason": piece.finish_reason}


def _sampling(body: GenerateRequest, defaults: Defaults, room: int, eos_token_ids: frozenset[int]) -> SamplingParams:
    """The request's own fields, then the version's defaults, then ours.

    Only a `max_tokens` that the request did not ask for gives way to the `room` left in the context.
    """
    return SamplingParams(
        max_tokens=body.max_tokens or min(defaults.max_tokens or DEFAULT_MAX_TOKENS, max(room, 1)),
        temperature=_given(body.temperature, defaults.temperature, 0.0),
        top_p=_given(body.top_p, defaults.top_p, 1.0),
        top_k=_given(body.top_k, defaults.top_k, 0),
        seed=body.seed,
        stop_token_ids=eos_token_ids,
    )


def _given(asked: T | None, default: T | None, ours: T) -> T:
    return next(value for value in (asked, default, ours) if value is not None)
