"""The shapes a training row may have, and the one shape they are turned into."""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from app.text import without_bos
from app.train.data import MAX_FIELD_CHARACTERS

Format = Literal["input/target", "prompt/completion", "messages"]

MAX_MESSAGES = 256
_PAIRS: dict[Format, tuple[str, str]] = {
    "input/target": ("input", "target"),
    "prompt/completion": ("prompt", "completion"),
}
_ROLES = ("system", "developer", "user", "assistant")
# The template a version gets unless the job names one. Completions and chats are sent to the model as they are.
DEFAULT_TEMPLATES: dict[Format, str | None] = {
    "input/target": "{input}\n",
    "prompt/completion": None,
    "messages": None,
}


class BadRow(Exception):
    """A row that cannot be trained on: a code for the kind of problem, and a message that quotes nothing."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def format_of(row: dict[str, Any]) -> Format:
    """Raises BadRow."""
    found: list[Format] = [name for name, members in _PAIRS.items() if any(member in row for member in members)]
    if "messages" in row:
        found.append("messages")
    if not found:
        raise BadRow("unknown_format", "has neither input and target, nor prompt and completion, nor messages")
    if len(found) > 1:
        raise BadRow("ambiguous_format", f"has members of {' and of '.join(found)}")
    return found[0]


def texts_of(row: dict[str, Any], kind: Format, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the model reads and what it shall answer. Raises BadRow."""
    if kind == "messages":
        return _chat(row["messages"], tokenizer)
    source, target = (_text(row, name) for name in _PAIRS[kind])
    if not target.strip():
        raise BadRow("empty_target", f"'{_PAIRS[kind][1]}' is empty")
    return source, target


def _text(row: dict[str, Any], name: str) -> str:
    if name not in row:
        raise BadRow("missing_member", f"has no '{name}'")
    return _string(row[name], f"'{name}'")


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{what} is not a string")
    if len(value) > MAX_FIELD_CHARACTERS:
        raise BadRow("too_long", f"{what} has {len(value)} characters, at most {MAX_FIELD_CHARACTERS}")
    if "\0" in value:
        raise BadRow("control_character", f"{what} holds a NUL character")
    return value


def _chat(messages: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The last message is the answer; those before it are written as the model's chat template has them."""
    if not isinstance(messages, list) or not 2 <= len(messages) <= MAX_MESSAGES:
        raise BadRow("bad_messages", f"'messages' must be a list of 2 to {MAX_MESSAGES}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise BadRow("bad_messages", f"message {number} is not an object")
        if set(message) - {"role", "content", "name", "weight"}:
            raise BadRow("bad_messages", f"message {number} has members besides role and content")
        if message.get("role") not in _ROLES:
            raise BadRow("bad_messages", f"the role of message {number} is none of {', '.join(_ROLES)}")
        _string(message.get("content"), f"the content of message {number}")
    *before, last = [{"role": message["role"], "content": message["content"]} for message in messages]
    if last["role"] != "assistant":
        raise BadRow("bad_messages", "the last message is not the assistant's")
    if not last["content"].strip():
        raise BadRow("empty_target", "the assistant's last message is empty")
    if not tokenizer.chat_template:
        raise BadRow("no_chat_template", "the base model has no chat template: give prompt and completion")
    try:
        text = str(tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates raise what they like about roles they do not know
        raise BadRow("bad_messages", "the base model's chat template refuses these roles") from error
    return without_bos(tokenizer, text), last["content"]
