"""POST /v1/completions: the text that follows a prompt, as OpenAI's clients ask for it."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import Response

from app.access import Caller
from app.answer import Piece
from app.api.access import CallerDep
from app.api.body import JsonRoute
from app.api.deadline import DeadlineDep
from app.api.deps import State, StateDep
from app.api.lease import Lease
from app.api.openai.logprobs import CompletionLogprobs, completion_logprobs
from app.api.openai.replies import CompletionReply
from app.api.openai.run import Prompt, Run, check_outputs, decode, respond
from app.api.openai.schemas import CompletionRequest
from app.api.reply import encode
from app.api.schemas import GenerateRequest
from app.errors import InvalidRequest
from app.manifest import Defaults

router = APIRouter(route_class=JsonRoute, tags=["openai"])

_EXAMPLES: dict[str, Any] = {
    "text": {
        "summary": "One prompt behind a task's soft prompt",
        "value": {"model": "sentiment", "prompt": "a gripping film\nSentiment:", "max_tokens": 4, "temperature": 0},
    },
    "score": {
        "summary": "Log-probabilities of a prompt, nothing generated",
        "value": {
            "model": "sentiment@prod",
            "prompt": ["the first text", "the second"],
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
        },
    },
    "stream": {
        "summary": "Token ids, streamed, with the usage at the end",
        "value": {
            "model": "sentiment:7",
            "prompt": [5, 6, 7],
            "stream": True,
            "stream_options": {"include_usage": True},
            "stop": ["\n"],
        },
    },
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The choices. With `stream`: chunks of them, with `include_usage` one more, `[DONE]`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post("/v1/completions", response_model=CompletionReply, responses=_RESPONSES)
async def create_completion(
    request: Request,
    body: Annotated[CompletionRequest, Body(openapi_examples=_EXAMPLES)],
    state: StateDep,
    deadline: DeadlineDep,
    caller: CallerDep,
) -> Response:
    """Continue a prompt, as it is, behind the soft prompt that `model` names, or by the bare base model.

    Fields that make no difference here are named in `X-Ignored-Fields`; those that would are 400.
    """
    _check(body, state.max_rows)
    return await respond(
        partial(Completion, state, caller, body=body),
        request=request,
        state=state,
        caller=caller,
        deadline=deadline,
        body=body,
        prompt_field="prompt",
    )


def _check(body: CompletionRequest, max_rows: int) -> None:
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens: 0 is for echo alone", param="max_tokens")
    if body.max_tokens == 0 and body.num_samples > 1:
        raise InvalidRequest("n: without new tokens there is but one answer for a prompt", param="n")
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise InvalidRequest("best_of: is less than n", param="best_of")
    if body.stream and body.num_samples > (body.n or 1):
        raise InvalidRequest("best_of: which are best is known at the end, not in a stream", param="best_of")
    check_outputs(len(_listed(body)), body, max_rows)


def _listed(body: CompletionRequest) -> list[Any]:
    """The prompts, of one kind: texts, or token ids of each."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    return [prompt] if isinstance(prompt[0], int) else list(prompt)


class Completion(Run):
    id_prefix = "cmpl"
    kind = chunk_kind = "text_completion"
    defaults = Defaults(max_tokens=16, temperature=1.0)
    reports_stop_token = True  # lm-evaluation-harness leaves out the last entry, whatever the token was

    def __init__(self, state: State, caller: Caller, lease: Lease, body: CompletionRequest) -> None:
        super().__init__(state, caller, lease, body)
        self._request = body
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by choice, while its stream lasts

    async def prompts(self) -> list[Prompt]:
        listed = _listed(self._request)
        if isinstance(listed[0], str):
            encoded = await encode(self._state.base.tokenizer, listed)
            return [Prompt(token_ids, text) for token_ids, text in zip(encoded, listed, strict=True)]
        echo = self._request.echo
        return [Prompt(ids, decode(self._state, self._body, ids) if echo else "") for ids in listed]

    def sampling(self) -> GenerateRequest:
        body = self._request
        reads = body.logprobs or 0 if body.echo and (body.logprobs is not None or body.max_tokens == 0) else None
        return body.generation(max_tokens=body.max_tokens, logprobs=body.logprobs, prompt_logprobs=reads)

    def choice(self, index: int, answer: int, piece: Piece) -> dict[str, Any]:
        return self._choice(index, answer, piece, begins=True)

    def chunks(self, index: int, piece: Piece, *, begins: bool) -> list[dict[str, Any]]:
        return [{"choices": [self._choice(index, index, piece, begins=begins)]}]

    def _choice(self, index: int, answer: int, piece: Piece, *, begins: bool) -> dict[str, Any]:
        body, prompt = self._request, self._prompts[answer // self._samples]
        echoed = begins and bool(body.echo)
        found: dict[str, Any] = {
            "index": index,
            "text": prompt.text + piece.text if echoed else piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
        }
        if body.logprobs is not None:
            logprobs = self._logprobs.setdefault(answer, self._new_logprobs())
            entries = []
            if echoed:
                entries += logprobs.of_prompt(
                    prompt.text, prompt.token_ids, self._answers[answer].prompt_logprobs or ()
                )
            found["logprobs"] = completion_logprobs(entries + logprobs.of_answer(piece.logprobs))
        if body.return_token_ids:
            found["prompt_token_ids"] = prompt.token_ids if begins else None
            found["token_ids"] = list(piece.token_ids)
        return found

    def _new_logprobs(self) -> CompletionLogprobs:
        skip = self._request.skip_special_tokens is not False
        return CompletionLogprobs(self._state.token_texts, self._state.base.tokenizer, skip_special_tokens=skip)
