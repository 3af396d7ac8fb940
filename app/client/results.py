"""What the server answers. Fields are those of the API (/docs); members added since are kept, not refused."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")


class Result(BaseModel):
    # NOTE: built when they are first needed, for a command needs two or three of them and should start at once.
    model_config = ConfigDict(extra="allow", frozen=True, defer_build=True)


class PromptTokensDetails(Result):
    soft_prompt_tokens: int
    cached_tokens: int


class Usage(Result):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Member(Result):
    """A version; nulls for the bare base model, and for an ensemble as a whole."""

    task: str | None
    version: int | None
    digest: str | None


class MadeBy(Member):
    id: str
    members: list[Member] | None = None  # of an ensemble
    system_fingerprint: str


class TopLogprob(Result):
    token: str
    id: int
    logprob: float  # nats


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Output(Result):
    index: int
    input_index: int | None = None
    text: str
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    votes: int | None = None  # members of an ensemble that gave this answer


class Generation(MadeBy):
    outputs: list[Output]
    usage: Usage


class StreamEvent(Result):
    """A piece of the answer `index`; the first event and the last, which has `usage`, also say what made it."""

    id: str
    task: str | None = None
    version: int | None = None
    digest: str | None = None
    system_fingerprint: str | None = None
    index: int | None = None
    input_index: int | None = None
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    usage: Usage | None = None


class Label(Result):
    index: int
    label: str
    probabilities: dict[str, float]


class Classification(MadeBy):
    results: list[Label]
    usage: Usage


class Tokens(Result):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(Result):
    prompt: str


class Page(Result, Generic[T]):
    data: list[T]
    has_more: bool = False


class Model(Result):
    id: str
    created: int  # Unix time
    parent: str | None
    task: str | None
    version: int | None
    digest: str | None
    aliases: list[str]
    num_virtual_tokens: int
    max_model_len: int  # positions, virtual tokens included


class Task(Result):
    task: str
    versions: list[int]
    aliases: dict[str, int]  # of a canary, the version with the largest share


class BaseReference(Result):
    name: str
    fingerprint: str | None = None


class Version(Result):
    """A version with its manifest."""

    task: str
    version: int
    reference: str
    aliases: list[str]
    pins: int  # requests that use it now
    deleted_at: str | None = None
    base: BaseReference | None
    template: str | None
    labels: list[str] | None
    defaults: dict[str, Any]
    task_id: int
    metrics: dict[str, Any]
    lineage: dict[str, Any]
    tags: dict[str, str]
    description: str
    digest: str
    created_at: str  # RFC 3339, UTC
    peft_type: str
    num_virtual_tokens: int
    size_bytes: int


class Published(Version):
    warnings: list[str]
    created: bool = Field(True, description="False: the task had these files already")


class Alias(Result):
    task: str
    alias: str
    version: int  # of a canary, the one with the largest share
    weights: dict[str, float] | None = None  # of a canary
    etag: str = Field("", description="What a move, a removal or a rollback has to name")


class Deleted(Result):
    id: str
    deleted: bool


class Change(Result):
    """An entry of a task's log."""

    seq: int
    op: str
    actor: str
    time: str  # RFC 3339, UTC
    alias: str | None
    version: int | None
    weights: dict[str, float] | None


class NearToken(Result):
    id: int
    text: str
    similarity: float  # cosine


class VirtualToken(Result):
    index: int
    norm: float | None = None
    nearest: list[NearToken] | None = None
    key_norm: float | None = None
    value_norm: float | None = None


class Similar(Result):
    reference: str
    similarity: float


class Inspection(Result):
    task: str
    version: int
    digest: str
    kind: str
    num_virtual_tokens: int
    embedding_norm: float | None
    virtual_tokens: list[VirtualToken]
    similar: list[Similar]


class AuditEntry(Result):
    id: int
    time: int  # Unix time
    request_id: str
    key_id: str
    action: str
    target: str
    status: int


class BaseModelInfo(Result):
    name: str
    fingerprint: str
    architecture: str
    dtype: str
    device: str
    hidden_size: int
    num_layers: int
    max_model_len: int


class Info(Result):
    version: str
    base: BaseModelInfo
    engine: dict[str, Any]
    tasks: int


class Readiness(Result):
    status: str
    checks: dict[str, str] = {}
