"""Bodies of requests and replies. Requests are strict: no unknown fields, and a "3" is not a 3."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from app.engine import MAX_SEED
from app.manifest import Label, Manifest, StopString

T = TypeVar("T")

MAX_INPUTS = 256
Reference = Annotated[
    str | None,
    Field(
        description="`task`, `task:7`, `task@alias` or `task@sha256:<digest>`; absent or the base model's id: "
        "the bare base model"
    ),
]
Input = Annotated[
    str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)],
    Field(description="One text, or several to be answered independently"),
]


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class GenerateRequest(_Strict):
    """Fields left out come from the version's defaults, then from the values described here."""

    task: Reference = None
    input: Input
    max_tokens: Annotated[int | None, Field(ge=1, le=1_000_000, description="At most so many new tokens; 128")] = None
    temperature: Annotated[float | None, Field(ge=0, le=100, description="0, the default, is greedy")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0, le=2**31 - 1, description="0 switches it off")] = None
    stop: Annotated[
        StopString | Annotated[list[StopString], Field(max_length=16)] | None,
        Field(description="Strings that end the answer; they are not part of it"),
    ] = None
    seed: Annotated[int | None, Field(ge=-MAX_SEED, le=MAX_SEED)] = None
    n: Annotated[int, Field(ge=1, le=1, description="Only 1 for now")] = 1
    stream: Annotated[bool, Field(description="Answer with server-sent events")] = False
    raw: Annotated[bool, Field(description="Apply neither the version's template nor its defaults")] = False


class ClassifyRequest(_Strict):
    task: Reference = None
    input: Input
    labels: Annotated[
        list[Label] | None,
        Field(min_length=2, max_length=1_000, description="Labels to choose from; the version's if absent"),
    ] = None


class AliasRequest(_Strict):
    version: Annotated[int, Field(ge=1, lt=10**9)]


class PromptTokensDetails(BaseModel):
    soft_prompt_tokens: int  # virtual tokens, over all inputs
    cached_tokens: int


class Usage(BaseModel):
    """Virtual tokens are not text and count only as `soft_prompt_tokens`."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Reply(BaseModel):
    id: str
    task: str | None  # null, like the two below: the bare base model
    version: int | None
    digest: str | None
    system_fingerprint: str  # of the base model and the version


class Output(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length", "abort"]


class GenerateReply(Reply):
    outputs: list[Output]
    usage: Usage


class Classification(BaseModel):
    index: int
    label: str
    probabilities: dict[str, float]


class ClassifyReply(Reply):
    results: list[Classification]
    usage: Usage


class Page(BaseModel, Generic[T]):
    object: Literal["list"]
    data: list[T]
    has_more: bool


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int  # Unix time
    owned_by: Literal["softprompt"]
    parent: str | None  # the base model, or null for it
    task: str | None
    version: int | None
    digest: str | None
    aliases: list[str]
    num_virtual_tokens: int
    max_model_len: int  # positions, virtual tokens included


class VersionReply(Manifest):
    task: str
    version: int
    reference: str
    aliases: list[str]
    pins: int  # requests that use it now


class PublishReply(VersionReply):
    warnings: list[str]


class AliasReply(BaseModel):
    task: str
    alias: str
    version: int


class TaskReply(BaseModel):
    object: Literal["task"]
    task: str
    versions: list[int]
    aliases: dict[str, int]


class Deleted(BaseModel):
    id: str
    object: Literal["task", "version"]
    deleted: Literal[True]


class Problem(BaseModel):
    """RFC 9457, and OpenAI's `error` beside it."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    error: dict[str, Any]
