"""Bodies of files and fine-tuning jobs: OpenAI's, with what a soft prompt needs under `method.prompt_tuning`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints, model_validator

from app.api.schemas import Strict
from app.jobs import Status
from app.manifest import StopString

Auto = Literal["auto"]
Id = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Text = Annotated[str, StringConstraints(max_length=10_000)]
METHODS = ("prompt_tuning", "supervised")


class Hyperparameters(Strict):
    """OpenAI's three. `auto`, or none: 16 rows, the recipe's rate, steps until the validation loss falls no more."""

    batch_size: Auto | Annotated[int, Field(ge=1, le=1_024)] | None = None
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=50)] | None = None
    n_epochs: Auto | Annotated[int, Field(ge=1, le=1_000)] | None = None


class PromptTuningHyperparameters(Hyperparameters):
    num_virtual_tokens: Annotated[int | None, Field(ge=1, le=1_024, description="20 by default")] = None
    max_steps: Annotated[int | None, Field(ge=1, le=100_000, description="300 by default; n_epochs wins")] = None
    eval_every: Annotated[int | None, Field(ge=1, le=100_000, description="Steps between two validations")] = None
    patience: Annotated[int | None, Field(ge=1, le=1_000, description="Validations without a better one")] = None
    max_length: Annotated[int | None, Field(ge=2, le=1_048_576, description="Tokens of a row; 512 by default")] = None


class PromptTuning(Strict):
    hyperparameters: PromptTuningHyperparameters | None = None
    template: Annotated[Text | None, Field(description="How `input` becomes text; by default `{input}\\n`")] = None
    init_text: Annotated[Text, Field(description="The virtual tokens start from its embeddings")] = ""
    classify: Annotated[
        bool | None, Field(description="Whether the targets are labels; by default if they are few and repeated")
    ] = None
    max_tokens: Annotated[int | None, Field(ge=1, le=1_000_000, description="Default length of an answer")] = None
    stop: Annotated[list[StopString], Field(max_length=16, description="Default stop strings")] = []
    description: Annotated[str, StringConstraints(max_length=4_000)] = ""
    alias: Annotated[str, Field(max_length=64, description="The alias to move; empty: none")] = "latest"
    gate: Annotated[bool, Field(description="Move it only if the version that it names is beaten")] = True


class Supervised(Strict):
    hyperparameters: Hyperparameters | None = None


class Method(Strict):
    """`supervised`, which OpenAI's clients send, is prompt tuning with its defaults."""

    type: Literal["prompt_tuning", "supervised"]
    prompt_tuning: PromptTuning | None = None
    supervised: Supervised | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") not in METHODS:
            raise ValueError(f"type must be one of {', '.join(METHODS)}")
        return value


class JobRequest(Strict):
    """A training job."""

    model: Annotated[str, Field(min_length=1, max_length=200, description="The base model's id, or a reference")]
    training_file: Id
    validation_file: Id | None = None
    suffix: Annotated[str | None, Field(min_length=1, max_length=64, description="The task to publish to")] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    metadata: Annotated[
        dict[
            Annotated[str, StringConstraints(max_length=64)],
            Annotated[str, StringConstraints(max_length=512)],
        ]
        | None,
        Field(max_length=16),
    ] = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    integrations: Annotated[list[Any] | None, Field(max_length=0)] = None


class FileReply(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int  # Unix seconds, as all times here
    filename: str
    purpose: Literal["fine-tune"]
    status: Literal["processed"]
    status_details: None
    expires_at: None


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class ErrorReply(BaseModel):
    code: str
    message: str
    param: str | None


class JobReply(BaseModel):
    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: Status
    error: ErrorReply | None
    model: str
    fine_tuned_model: Annotated[str | None, Field(description="The reference that was published")]
    organization_id: str
    task: str
    training_file: str
    validation_file: str | None
    result_files: list[str]
    seed: int
    trained_tokens: int | None
    step: int
    max_steps: int | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    metadata: dict[str, str]
    integrations: list[Any]
    data: Annotated[dict[str, Any], Field(description="What the check of the files found")]
    metrics: Annotated[dict[str, Any] | None, Field(description="Scores of the published version")]
    gate: Annotated[dict[str, Any] | None, Field(description="Whether the alias was moved, and why")]


class EventReply(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class CheckpointReply(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float]
    step_number: int
