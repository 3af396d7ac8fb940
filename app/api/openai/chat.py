"""POST /v1/chat/completions: the next message of a conversation, as OpenAI's clients ask for it."""

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
from app.api.openai.chat_template import chat_text
from app.api.openai.logprobs import chat_logprobs
from app.api.openai.replies import ChatReply
from app.api.openai.run import Prompt, Run, check_outputs, respond
from app.api.openai.schemas import ChatRequest
from app.api.reply import encode
from app.api.schemas import GenerateRequest
from app.errors import InvalidRequest
from app.manifest import Defaults

router = APIRouter(route_class=JsonRoute, tags=["openai"])

_EXAMPLES: dict[str, Any] = {
    "chat": {
        "summary": "A conversation behind a task's soft prompt",
        "value": {
            "model": "assistant",
            "messages": [
                {"role": "system", "content": "Answer in one word."},
                {"role": "user", "content": "What is the capital of France?"},
            ],
            "max_completion_tokens": 8,
        },
    },
    "json": {
        "summary": "An answer that is JSON by a schema, streamed",
        "value": {
            "model": "assistant:7",
            "messages": [{"role": "user", "content": "A colour, please."}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "colour", "schema": {"enum": ["red", "green"]}},
            },
            "stream": True,
        },
    },
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The choices. With `stream`: chunks of them, of which a choice's first has the `role` and its "
        "last the `finish_reason`; with `include_usage` one more; `[DONE]`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post("/v1/chat/completions", response_model=ChatReply, responses=_RESPONSES)
async def create_chat_completion(
    request: Request,
    body: Annotated[ChatRequest, Body(openapi_examples=_EXAMPLES)],
    state: StateDep,
    deadline: DeadlineDep,
    caller: CallerDep,
) -> Response:
    """Answer messages behind the soft prompt that `model` names, or by the bare base model.

    The base model's chat template makes them text. Fields that make no difference here are named in
    `X-Ignored-Fields`; those that would are 400.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs: only with logprobs", param="top_logprobs")
    check_outputs(1, body, state.max_rows)
    return await respond(
        partial(Chat, state, caller, body=body),
        request=request,
        state=state,
        caller=caller,
        deadline=deadline,
        body=body,
        prompt_field="messages",
    )


class Chat(Run):
    id_prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    defaults = Defaults(max_tokens=1_000_000, temperature=1.0)  # as many as there is room for
    reports_stop_token = False

    def __init__(self, state: State, caller: Caller, lease: Lease, body: ChatRequest) -> None:
        super().__init__(state, caller, lease, body)
        self._request = body

    async def prompts(self) -> list[Prompt]:
        tokenizer = self._state.base.tokenizer
        text = await chat_text(tokenizer, self._request.messages)
        # The template has written the special tokens.
        [token_ids] = await encode(tokenizer, [text], add_special_tokens=False)
        return [Prompt(token_ids, text)]

    def sampling(self) -> GenerateRequest:
        body = self._request
        return body.generation(
            max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )

    def choice(self, index: int, answer: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._choice(index, piece, {"message": message}) | {"finish_reason": piece.finish_reason}

    def chunks(self, index: int, piece: Piece, *, begins: bool) -> list[dict[str, Any]]:
        chunks: list[dict[str, Any]] = []
        if begins:
            role = {"delta": {"role": "assistant", "content": ""}}
            chunks.append({"choices": [{"index": index, **role, "logprobs": None, "finish_reason": None}]})
            chunks[0] |= self.reply_members()
        if piece.text or piece.logprobs or piece.token_ids:
            choice = self._choice(index, piece, {"delta": {"content": piece.text}})
            chunks.append({"choices": [choice | {"finish_reason": None}]})
        if piece.finish_reason is not None:
            last = {"index": index, "delta": {}, "logprobs": None, "finish_reason": piece.finish_reason}
            chunks.append({"choices": [last]})
        return chunks

    def reply_members(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._prompts[0].token_ids} if self._request.return_token_ids else {}

    def _choice(self, index: int, piece: Piece, content: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, **content, "logprobs": None}
        if self._request.logprobs:
            choice["logprobs"] = chat_logprobs(self._state.token_texts, piece.logprobs)
        if self._request.return_token_ids:
            choice["token_ids"] = list(piece.token_ids)
        return choice
