"""Bodies of replies, for the document: they are sent without passing through these."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from app.api.schemas import Usage

FinishReason = Literal["stop", "length", "abort"]


class CompletionLogprobsReply(BaseModel):
    """Lists of one entry for each token. With `echo` the prompt's come first, of which the first has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # characters


class CompletionChoice(BaseModel):
    index: int  # choices n * i to n * i + n - 1 are prompt i's
    text: str
    logprobs: CompletionLogprobsReply | None
    finish_reason: FinishReason
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class _Reply(BaseModel):
    id: str
    created: int  # Unix time
    model: str
    system_fingerprint: str  # of the base model and the version
    usage: Usage


class CompletionReply(_Reply):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ChatTopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None  # null for a part of a character


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobsReply(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobsReply | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class ChatReply(_Reply):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_token_ids: list[int] | None = None


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(BaseModel):
    prompt: str
