"""Bodies of files and fine-tuning jobs: OpenAI's, with what a soft prompt needs under `method.<its type>`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints, model_validator

from app.api.schemas import Strict
from app.jobs import Status
from app.manifest import StopString
from app.train.recipe import METHODS, Encoder, Init, MethodName, Precision

Auto = Literal["auto"]
Id = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Text = Annotated[str, StringConstraints(max_length=10_000)]
TYPES = (*METHODS, "supervised")


class Hyperparameters(Strict):
    """OpenAI's three. `auto`, or none: 16 rows, the recipe's rate, steps until the validation loss falls no more."""

    batch_size: Auto | Annotated[int, Field(ge=1, le=1_024)] | None = None
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=50)] | None = None
    n_epochs: Auto | Annotated[int, Field(ge=1, le=1_000)] | None = None


class PromptTuningHyperparameters(Hyperparameters):
    """Those of all methods; what one has no use for says nothing."""

    learning_rate: Annotated[
        Auto | Annotated[float, Field(ge=1e-8, le=10)] | None,
        Field(description="Instead of a multiplier; `auto` tries three in short runs"),
    ] = None
    budget_seconds: Annotated[
        float | None, Field(ge=1, le=31_536_000, description="Of training: as many steps as it has room for")
    ] = None
    residual_size: Annotated[int | None, Field(ge=1, le=8_192, description="Width of `residual`; 128")] = None
    encoder: Annotated[Encoder | None, Field(description="Of p_tuning; mlp")] = None
    encoder_hidden_size: Annotated[int | None, Field(ge=1, le=8_192, description="Of p_tuning; 256")] = None
    num_ranks: Annotated[int | None, Field(ge=1, le=64, description="Of multitask_prompt_tuning; 1")] = None
    num_frozen_tokens: Annotated[int | None, Field(ge=0, le=1_023, description="Of a cartridge; 1")] = None
    cpt_epsilon: Annotated[
        float | None, Field(ge=1e-6, le=1_000, description="How far cpt moves a token, in an embedding's norm; 0.5")
    ] = None
    num_virtual_tokens: Annotated[int | None, Field(ge=1, le=1_024, description="20 by default")] = None
    max_steps: Annotated[int | None, Field(ge=1, le=100_000, description="300 by default; n_epochs wins")] = None
    eval_every: Annotated[int | None, Field(ge=1, le=100_000, description="Steps between two validations")] = None
    patience: Annotated[int | None, Field(ge=1, le=1_000, description="Validations without a better one")] = None
    max_length: Annotated[int | None, Field(ge=2, le=1_048_576, description="Tokens of a row; 512 by default")] = None
    precision: Annotated[
        Precision | None, Field(description="`auto`, the default: products in bfloat16 where a CPU has it")
    ] = None


class PromptTuning(Strict):
    hyperparameters: PromptTuningHyperparameters | None = None
    template: Annotated[Text | None, Field(description="How `input` becomes text; by default `{input}\\n`")] = None
    init: Annotated[
        Init | None,
        Field(description="What it starts from; by default the prompt that is the `model`, else a text, else chance"),
    ] = None
    init_text: Annotated[Text, Field(description="The virtual tokens start from its embeddings")] = ""
    residual: Annotated[bool, Field(description="A network beside the prompt while it is trained")] = False
    for_task: Annotated[
        str | None,
        Field(max_length=200, description="Of the rows' tasks the one to publish, by default the first by name"),
    ] = None
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

    type: MethodName | Literal["supervised"]
    prompt_tuning: PromptTuning | None = None
    p_tuning: PromptTuning | None = None
    prefix_tuning: PromptTuning | None = None
    cartridge: PromptTuning | None = None
    multitask_prompt_tuning: PromptTuning | None = None
    cpt: PromptTuning | None = None
    supervised: Supervised | None = None

    @property
    def name(self) -> MethodName:
        return "prompt_tuning" if self.type == "supervised" else self.type

    @property
    def tuning(self) -> PromptTuning | None:
        """The member that the type names."""
        found: PromptTuning | None = getattr(self, self.name)
        return found

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") not in TYPES:
            raise ValueError(f"type must be one of {', '.join(TYPES)}")
        return value

    @model_validator(mode="after")
    def _of_its_type(self) -> Method:
        for name in METHODS:
            if name != self.name and getattr(self, name) is not None:
                raise ValueError(f"{name} is given, and the type is {self.type}")
        return self


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
