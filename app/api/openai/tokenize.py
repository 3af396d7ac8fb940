"""POST /tokenize and /detokenize: text to the base model's token ids and back, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Body

from app.access import Caller
from app.api.access import CallerDep
from app.api.body import JsonRoute
from app.api.deps import State, StateDep
from app.api.openai.chat_template import chat_text
from app.api.openai.replies import DetokenizeReply, TokenizeReply
from app.api.openai.schemas import DetokenizeRequest, TokenizeRequest
from app.api.reply import encode
from app.api.visible import check_reference
from app.errors import InvalidRequest

router = APIRouter(route_class=JsonRoute, tags=["openai"])

_TOKENIZE: dict[str, Any] = {
    "prompt": {"summary": "A text", "value": {"prompt": "The capital of France is", "return_token_strs": True}},
    "chat": {
        "summary": "Messages, as the base model's chat template writes them",
        "value": {"messages": [{"role": "user", "content": "Good morning"}]},
    },
}
_DETOKENIZE: dict[str, Any] = {"tokens": {"summary": "Token ids", "value": {"tokens": [5, 6, 7]}}}


@router.post("/tokenize", response_model=TokenizeReply)
async def tokenize(
    body: Annotated[TokenizeRequest, Body(openapi_examples=_TOKENIZE)], state: StateDep, caller: CallerDep
) -> Any:
    """Token ids of a prompt, or of messages. Virtual tokens are not text and are not among them."""
    _check_model(state, caller, body.model)
    tokenizer = state.base.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("prompt: give it or messages, one of them", param="prompt")
    if body.messages is not None:
        text = await chat_text(tokenizer, body.messages, add_generation_prompt=body.add_generation_prompt)
        special = bool(body.add_special_tokens)  # the template has written them
    else:
        text, special = body.prompt or "", body.add_special_tokens is not False
    [tokens] = await encode(tokenizer, [text], add_special_tokens=special)
    return {
        "count": len(tokens),
        "max_model_len": state.engine.max_model_len,
        "tokens": tokens,
        "token_strs": tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None,
    }


@router.post("/detokenize", response_model=DetokenizeReply)
async def detokenize(
    body: Annotated[DetokenizeRequest, Body(openapi_examples=_DETOKENIZE)], state: StateDep, caller: CallerDep
) -> Any:
    """The text of token ids, special ones included."""
    _check_model(state, caller, body.model)
    size = state.base.info.vocab_size
    bad = next((token_id for token_id in body.tokens if token_id >= size), None)
    if bad is not None:
        raise InvalidRequest(f"tokens: {bad} is not in the vocabulary of {size}", param="tokens")
    tokenizer: Any = state.base.tokenizer

    def run() -> str:
        text: str = tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)
        return text

    return {"prompt": await anyio.to_thread.run_sync(run)}


def _check_model(state: State, caller: Caller, model: str | None) -> None:
    """Every reference has the base model's tokens. Raises ReferenceNotFound."""
    check_reference(caller, model, state.base.info.name)
    if model is not None and model != state.base.info.name:
        state.registry.resolve(model)
