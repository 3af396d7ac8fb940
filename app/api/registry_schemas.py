"""Bodies of what concerns tasks, versions and aliases."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from app.api.schemas import Strict
from app.manifest import Manifest
from app.registry import MAX_SPLIT

MAX_NUMBER = 10**9  # of a version


class AliasRequest(Strict):
    """Either of the two."""

    version: Annotated[int, Field(ge=1, lt=MAX_NUMBER)] | None = None
    weights: Annotated[
        dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")], Annotated[float, Field(gt=0)]] | None,
        Field(
            min_length=1,
            max_length=MAX_SPLIT,
            description="A canary: version to weight, chosen per request, always the same for the same `user`",
        ),
    ] = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.version is None) == (self.weights is None):
            raise ValueError("give either version or weights")
        return self


class VersionReply(Manifest):
    task: str
    version: int
    reference: str
    aliases: list[str]
    pins: int  # requests that use it now
    deleted_at: str | None = None  # set: it can be restored until its files are collected


class PublishReply(VersionReply):
    warnings: list[str]


class AliasReply(BaseModel):
    task: str
    alias: str
    version: Annotated[int, Field(description="Of a canary, the one with the largest share")]
    weights: dict[str, float] | None = None  # of a canary; they sum to 1


class TaskReply(BaseModel):
    object: Literal["task"]
    task: str
    versions: list[int]
    aliases: Annotated[dict[str, int], Field(description="Of a canary, the version with the largest share")]


class Deleted(BaseModel):
    id: str
    object: Literal["task", "version", "alias"]
    deleted: Literal[True]


class HistoryEntry(BaseModel):
    """One change of a task, as its log has it."""

    object: Literal["change"]
    seq: int  # also the etag of an alias that this moved
    op: str
    actor: str
    time: str  # RFC 3339, UTC
    alias: str | None
    version: int | None
    weights: dict[str, float] | None


class NearToken(BaseModel):
    id: int
    text: str
    similarity: float  # cosine


class VirtualToken(BaseModel):
    """Norms are those of float32; keys and values have one over all layers and heads."""

    index: int
    norm: float | None = None
    nearest: list[NearToken] | None = None  # of the vocabulary; keys and values have none
    key_norm: float | None = None
    value_norm: float | None = None


class SimilarVersion(BaseModel):
    reference: str
    similarity: float


class InspectReply(BaseModel):
    task: str
    version: int
    digest: str
    kind: Literal["embedding", "kv"]
    num_virtual_tokens: int
    embedding_norm: float | None  # median over the vocabulary
    virtual_tokens: list[VirtualToken]
    similar: Annotated[
        list[SimilarVersion],
        Field(description="Other tasks, by the cosine between the means over the virtual tokens (Vu et al. 2022)"),
    ]
