"""Bodies of requests and replies. Requests are strict: no unknown fields, and a "3" is not a 3."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from app.api.logprobs import MIN_LOGPROB
from app.engine import MAX_LOGPROBS, MAX_SEED
from app.manifest import Label, StopString

T = TypeVar("T")

MAX_INPUTS = 256
MAX_OUTPUTS = 256  # inputs times n
MAX_MEMBERS = 16  # of an ensemble
MAX_BIASES = 1024
MAX_LOGPROB_ENTRIES = 500_000  # in one reply, some 60 bytes each
Reference = Annotated[
    str | Annotated[list[str], Field(min_length=1, max_length=MAX_MEMBERS)] | None,
    Field(
        description="`task`, `task:7`, `task@alias` or `task@sha256:<digest>`; absent or the base model's id: "
        "the bare base model. Several make an ensemble: one batch, one combined answer"
    ),
]
CacheSalt = Annotated[
    str | None,
    Field(min_length=1, max_length=200, description="Cached text is shared only among requests of the same salt"),
]
Penalty = Annotated[float | None, Field(ge=-2, le=2)]
Input = Annotated[
    str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)],
    Field(description="One text, or several that are answered independently, all by one version, or none of them"),
]


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class JsonSchemaFormat(Strict):
    """OpenAI's, in which `strict` says nothing here: the constraint always holds."""

    name: Annotated[str | None, Field(max_length=200)] = None
    description: Annotated[str | None, Field(max_length=2_000)] = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


User = Annotated[
    str | None,
    Field(min_length=1, max_length=200, description="Who asks: a canary gives the same user the same version"),
]


class GenerateRequest(Strict):
    """Fields left out come from the version's defaults, then from the values described here."""

    task: Reference = None
    input: Input
    max_tokens: Annotated[
        int | None,
        Field(
            ge=0,
            le=1_000_000,
            description="At most so many new tokens; 128. 0 only with `prompt_logprobs`, and `n` of 1",
        ),
    ] = None
    min_tokens: Annotated[int, Field(ge=0, le=1_000_000, description="No end before so many new tokens")] = 0
    temperature: Annotated[float | None, Field(ge=0, le=100, description="0, the default, is greedy")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0, le=2**31 - 1, description="0 switches it off")] = None
    min_p: Annotated[float | None, Field(ge=0, le=1, description="Least probability, relative to the best's")] = None
    repetition_penalty: Annotated[
        float | None, Field(ge=0.01, le=100, description="Of tokens in the input and the answer; 1 switches it off")
    ] = None
    presence_penalty: Annotated[Penalty, Field(description="Of tokens in the answer, once")] = None
    frequency_penalty: Annotated[Penalty, Field(description="Of tokens in the answer, for each time")] = None
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None,
        Field(max_length=MAX_BIASES, description="Token id, as a string, to what is added to its logit"),
    ] = None
    stop: Annotated[
        StopString | Annotated[list[StopString], Field(max_length=16)] | None,
        Field(description="Strings that end the answer; they are not part of it"),
    ] = None
    stop_token_ids: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**31)]] | None,
        Field(max_length=64, description="Tokens that end the answer, besides the model's own"),
    ] = None
    ignore_eos: Annotated[bool, Field(description="The model's own end tokens do not end the answer")] = False
    seed: Annotated[int | None, Field(ge=-MAX_SEED, le=MAX_SEED)] = None
    n: Annotated[
        int,
        Field(ge=1, le=MAX_OUTPUTS, description="Answers for each input: outputs n * i to n * i + n - 1 are input i's"),
    ] = 1
    logprobs: Annotated[
        int | None,
        Field(ge=0, le=MAX_LOGPROBS, description="Log-probability of each token, and of so many likeliest ones"),
    ] = None
    prompt_logprobs: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_LOGPROBS,
            description="The same for the tokens of the input; of several answers the first carries them",
        ),
    ] = None
    response_format: Annotated[
        TextFormat | JsonObjectFormat | JsonFormat | None,
        Field(discriminator="type", description="JSON, or JSON by a schema: the answer cannot be anything else"),
    ] = None
    cache_salt: CacheSalt = None
    user: User = None
    stream: Annotated[bool, Field(description="Answer with server-sent events")] = False
    raw: Annotated[bool, Field(description="Apply neither the version's template nor its defaults")] = False


class ClassifyRequest(Strict):
    task: Reference = None
    input: Input
    cache_salt: CacheSalt = None
    user: User = None
    labels: Annotated[
        list[Label] | None,
        Field(min_length=2, max_length=1_000, description="Labels to choose from; the version's if absent"),
    ] = None
    calibrated: Annotated[
        bool | None,
        Field(
            description="Whether scores are divided by the version's temperature: by default where it has one for "
            "these labels; with true it is 400 where it has none"
        ),
    ] = None


class PromptTokensDetails(BaseModel):
    soft_prompt_tokens: int  # virtual tokens, over all inputs
    cached_tokens: Annotated[int, Field(description="Text found in the cache; only generation counts it")]


class Usage(BaseModel):
    """Virtual tokens are not text and count only as `soft_prompt_tokens`."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Member(BaseModel):
    task: str | None
    version: int | None
    digest: str | None
    calibrated: bool | None = None  # of a classification


class Reply(BaseModel):
    id: str
    task: str | None  # null, like the two below: the bare base model, or an ensemble
    version: int | None
    digest: str | None
    members: list[Member] | None = None  # of an ensemble
    system_fingerprint: str  # of the base model and the versions


class TopLogprob(BaseModel):
    token: str
    id: int
    logprob: Annotated[float, Field(ge=MIN_LOGPROB, description=f"In nats; {MIN_LOGPROB} for impossible")]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Output(BaseModel):
    index: int
    input_index: int | None = None  # where the input is a list: which of it, counted from 0
    text: str
    finish_reason: Literal["stop", "length", "abort"]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None  # of an input's first answer
    votes: int | None = None  # members of an ensemble that gave this answer


class GenerateReply(Reply):
    outputs: list[Output]
    usage: Usage


class Classification(BaseModel):
    index: int
    label: str
    probabilities: dict[str, float]


class ClassifyReply(Reply):
    calibrated: bool | None  # null for an ensemble, whose members each say so
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


class AuditReply(BaseModel):
    object: Literal["audit_entry"]
    id: int
    time: int  # Unix time
    request_id: str
    key_id: str
    action: str  # the operation's id
    target: str
    status: int  # of HTTP


class Problem(BaseModel):
    """RFC 9457, and OpenAI's `error` beside it."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    error: dict[str, Any]
