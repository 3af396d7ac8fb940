"""A training job: what was asked for, how far it is, and which state may follow which."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from app.errors import InvalidRequest

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = get_args(Status)
FINISHED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
ACTIVE: tuple[Status, ...] = ("validating_files", "queued", "running", "paused")
Level = Literal["info", "warn", "error"]


@dataclass(frozen=True)
class JobError:
    """Why a job failed, in OpenAI's members."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is trained and how, as far as the caller chose it; `recipe` holds fields of app.train.recipe.Recipe."""

    recipe: dict[str, Any] = field(default_factory=dict)
    num_epochs: int | None = None  # over `max_steps` of the recipe
    template: str | None = None  # None: what suits the rows' format
    classify: bool | None = None  # None: if the targets look like labels
    max_tokens: int | None = None
    stop: list[str] = field(default_factory=list)
    description: str = ""
    alias: str = "latest"  # empty: none
    gate: bool = True
    for_task: str | None = None  # of the rows' tasks the one that is published; None: the first by name


@dataclass(frozen=True, kw_only=True)
class Job:
    """Immutable; `JobStore.change` puts another one in its place. Times are Unix seconds."""

    id: str
    created_at: int
    owner: str  # the id of the key that asked for it
    tenant: str
    model: str
    task: str
    training_file: str
    validation_file: str | None = None
    seed: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)  # hyperparameters and method as they are shown
    options: Options = Options()

    status: Status = "validating_files"
    is_checked: bool = False
    is_publishing: bool = False  # too late to cancel or pause
    started_at: int | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    seconds: float = 0.0  # spent in workers
    step: int = 0
    max_steps: int | None = None
    trained_tokens: int = 0
    crashes: int = 0  # in a row, without a step forward
    crash_step: int = -1
    error: JobError | None = None
    fine_tuned_model: str | None = None
    data: dict[str, Any] = field(default_factory=dict)  # what the check found
    report: dict[str, Any] = field(default_factory=dict)  # of the trainer
    decided: dict[str, Any] = field(default_factory=dict)  # of the alias, before anything is published: Decision
    result: dict[str, Any] = field(default_factory=dict)  # metrics and gate

    @property
    def is_finished(self) -> bool:
        return self.status in FINISHED

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), allow_nan=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Job:
        """Raises ValueError for what no version of this wrote."""
        try:
            fields = json.loads(data)
            error = fields.pop("error")
            options = Options(**fields.pop("options"))
            job = cls(**fields, options=options, error=None if error is None else JobError(**error))
        except (TypeError, KeyError, AttributeError) as problem:
            raise ValueError("not a job") from problem
        if job.status not in STATUSES:
            raise ValueError("not a status")
        return job


@dataclass(frozen=True)
class Event:
    """One line of a job's story."""

    id: str
    created_at: int
    level: Level
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None


def cancelled(job: Job, now: int) -> Job:
    """Raises InvalidRequest once it is finished, or about to be."""
    _check_open(job, "cancelled")
    return replace(job, status="cancelled", finished_at=now, estimated_finish=None)


def paused(job: Job) -> Job:
    _check_open(job, "paused")
    if job.status == "paused":
        raise _refused("it is paused already")
    return replace(job, status="paused", estimated_finish=None)


def resumed(job: Job) -> Job:
    if job.status != "paused":
        raise _refused(f"only a paused job can be resumed; this one is {job.status}")
    return replace(job, status="queued" if job.is_checked else "validating_files", crashes=0, crash_step=-1)


def _check_open(job: Job, what: str) -> None:
    if job.is_finished:
        raise _refused(f"a job that has {job.status} cannot be {what}" if job.status != "cancelled" else "it is over")
    if job.is_publishing:
        raise _refused(f"it is being published and can no longer be {what}")


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(why, code="invalid_job_state")
