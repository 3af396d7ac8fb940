"""Messages to the text that the base model was taught to read them as."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import anyio.to_thread
from jinja2 import TemplateError

from app.api.openai.schemas import Message
from app.errors import InvalidRequest


async def chat_text(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    """By the base model's own chat template, its special tokens included as text.

    `developer` is OpenAI's newer name for `system`; parts of a message are joined by a line break. Raises
    InvalidRequest for messages that the template refuses, e.g. roles that do not take turns, and for a base model that
    has no template.
    """
    if not tokenizer.chat_template:
        raise InvalidRequest("messages: the base model has no chat template; /v1/completions takes text", param="model")
    given = [_message(message) for message in messages]
    render = partial(tokenizer.apply_chat_template, given, tokenize=False, add_generation_prompt=add_generation_prompt)
    try:
        text: str = await anyio.to_thread.run_sync(render)
    except TemplateError:
        raise InvalidRequest(
            "messages: the base model's chat template does not take these roles in this order", param="messages"
        ) from None
    return text


def _message(message: Message) -> dict[str, str]:
    parts = message.content
    content = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
    found = {"role": "system" if message.role == "developer" else message.role, "content": content}
    return found if message.name is None else {**found, "name": message.name}
