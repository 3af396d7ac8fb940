"""Bodies of requests as OpenAI's clients send them, with vLLM's extras. Types are strict; null means left out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from app.api.schemas import (
    MAX_BIASES,
    MAX_INPUTS,
    MAX_OUTPUTS,
    CacheSalt,
    GenerateRequest,
    JsonFormat,
    JsonObjectFormat,
    Penalty,
    Strict,
    TextFormat,
    User,
)
from app.engine import MAX_LOGPROBS, MAX_SEED
from app.manifest import StopString

MAX_STOPS = 4
MAX_MESSAGES = 1_000

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True, min_length=1)]
Count = Annotated[int | None, Field(ge=0, le=1_000_000)]
MaxTokens = Annotated[int | None, Field(ge=1, le=1_000_000)]
Model = Annotated[
    str, Field(description="`task`, `task:7`, `task@alias`, `task@sha256:<digest>`, or the base model's id")
]


def _kind(value: Any) -> str:
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else ""
    return {int: "tokens", list: "token lists"}.get(type(first), "texts")


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS), Tag("texts")]
    | Annotated[TokenIds, Tag("tokens")]
    | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS), Tag("token lists")],
    Discriminator(_kind),
]


class StreamOptions(Strict):
    include_usage: Annotated[bool | None, Field(description="One more chunk, the last, has `usage`")] = None
    continuous_usage_stats: Annotated[
        bool | None, Field(description="With `include_usage`: every chunk has it, so far")
    ] = None
    include_obfuscation: Annotated[bool | None, Field(description="Nothing is padded here")] = None


class Sampled(BaseModel):
    """What completions and chat have in common. A version's template and defaults are for `/v1/generate` alone."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    model: Model
    temperature: Annotated[float | None, Field(ge=0, le=100, description="0 is greedy; 1 by default")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=2**31 - 1, description="0 and -1 switch it off")] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, Field(max_length=MAX_BIASES)] = (
        None
    )
    n: Annotated[int | None, Field(ge=1, le=MAX_OUTPUTS)] = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]] | None, Field(max_length=64)] = None
    include_stop_str_in_output: Annotated[bool | None, Field(description="What ends the text is part of it")] = None
    ignore_eos: bool | None = None
    min_tokens: Count = None
    skip_special_tokens: Annotated[bool | None, Field(description="Not in the text; true by default")] = None
    seed: Annotated[int | None, Field(ge=-MAX_SEED, le=MAX_SEED)] = None
    response_format: Annotated[
        TextFormat | JsonObjectFormat | JsonFormat | None,
        Field(discriminator="type", description="JSON, or JSON by a schema: the text cannot be anything else"),
    ] = None
    return_token_ids: Annotated[bool | None, Field(description="Those of the prompt and of the text")] = None
    truncate_prompt_tokens: Annotated[
        int | None, Field(ge=-1, le=1_000_000, description="Only the last so many; -1: as many as there is room for")
    ] = None
    cache_salt: CacheSalt = None
    user: User = None
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None,
        Field(max_length=16, description="For the client alone"),
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def num_samples(self) -> int:
        """Answers that are made for each prompt."""
        return self.n or 1

    def generation(
        self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> GenerateRequest:
        """The same wishes as `/v1/generate` has them; each was checked here."""
        shared = GenerateRequest.model_fields.keys() & type(self).model_fields.keys()
        given = {name: value for name in shared if (value := getattr(self, name)) is not None}
        given |= {
            "n": self.num_samples,
            "top_k": max(self.top_k or 0, 0),
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
        }
        return GenerateRequest.model_construct(**given)


class CompletionRequest(Sampled):
    prompt: Annotated[Prompt, Field(description="A text, texts, token ids, or lists of them")]
    max_tokens: Annotated[Count, Field(description="16 by default; 0 with `echo`: the prompt alone")] = None
    logprobs: Annotated[int | None, Field(ge=0, le=5, description="Of each token, and of so many likeliest")] = None
    echo: Annotated[bool | None, Field(description="The prompt stands before the text")] = None
    best_of: Annotated[
        int | None, Field(ge=1, le=MAX_OUTPUTS, description="Make so many, and reply with the `n` likeliest by token")
    ] = None

    @property
    def num_samples(self) -> int:
        return max(self.n or 1, self.best_of or 1)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """What a reply had, such as `"refusal": null`, may come back; a message that says more than text may not."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]
    name: Annotated[str | None, Field(max_length=200)] = None

    @model_validator(mode="after")
    def _check_extra(self) -> Message:
        if any((self.model_extra or {}).values()):
            raise ValueError("a message has a role, a content of text, and a name")
        return self


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatRequest(Sampled):
    messages: Messages
    max_completion_tokens: Annotated[
        MaxTokens, Field(description="By default as many as there is room for; before `max_tokens`, its older name")
    ] = None
    max_tokens: MaxTokens = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS, description="Only with `logprobs`")] = None


class TokenizeRequest(Strict):
    """A prompt or messages, as vLLM has it."""

    model: Model | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: Annotated[bool | None, Field(description="For a prompt true by default")] = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    model: Model | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
