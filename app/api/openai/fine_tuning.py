"""/v1/fine_tuning/jobs: training jobs, as OpenAI's clients create, follow and cancel them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Query, Request
from fastapi.responses import HTMLResponse
from safetensors.torch import save

from app.access import Caller
from app.api.access import CallerDep
from app.api.body import JsonRoute
from app.api.deps import State, StateDep
from app.api.openai.files import find_file, is_theirs
from app.api.openai.fine_tuning_schemas import CheckpointReply, EventReply, JobReply, JobRequest
from app.api.openai.job_options import method_of, options_of, shown
from app.api.paging import After, paged
from app.api.schemas import Page
from app.api.visible import check_reference, check_task
from app.errors import InvalidRequest, Overloaded
from app.jobs import Event, Job
from app.jobs.job import cancelled, paused, resumed
from app.jobs.names import new_id, unknown
from app.jobs.owner import check_publishing
from app.jobs.page import page
from app.registry import Pin
from app.registry.reference import check_task_name
from app.train.html_report import POLICY
from app.train.recipe import KV_METHODS

router = APIRouter(route_class=JsonRoute, prefix="/v1/fine_tuning/jobs", tags=["training"])

Limit = Annotated[int, Query(ge=1, le=1_000)]


# A page that has names from the caller's data: it may load, run and send nothing, nor stand in another page.
_PAGE = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'; sandbox",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

_EXAMPLES: dict[str, Any] = {
    "plain": {
        "summary": "As OpenAI's clients send it",
        "value": {"model": "smollm2-135m-instruct", "training_file": "file-0123456789a0123456789ab", "suffix": "mood"},
    },
    "prompt_tuning": {
        "summary": "With what a soft prompt can be told",
        "value": {
            "model": "smollm2-135m-instruct",
            "training_file": "file-0123456789a0123456789ab",
            "suffix": "mood",
            "seed": 1,
            "method": {
                "type": "prompt_tuning",
                "prompt_tuning": {
                    "template": "{input}\nSentiment:",
                    "init_text": "Is the sentiment of the text negative or positive?",
                    "hyperparameters": {"num_virtual_tokens": 20, "max_steps": 300},
                },
            },
        },
    },
}


async def find_job(job: str, state: StateDep, caller: CallerDep) -> Job:
    found = await state.storing.run(partial(state.jobs.get, job))
    if not (is_theirs(caller, found) and caller.sees(found.task)):
        raise unknown("ftjob")
    return found


JobDep = Annotated[Job, Depends(find_job)]


@router.post("", response_model=JobReply)
async def create_fine_tuning_job(
    body: Annotated[JobRequest, Body(openapi_examples=_EXAMPLES)], request: Request, state: StateDep, caller: CallerDep
) -> Any:
    """Train a soft prompt on a file and publish it as a version of the task `suffix`.

    `model` is the base model's id, or a reference to a soft prompt to start from.
    """
    if not state.settings.max_training_jobs:
        raise Overloaded("this server takes no training jobs")
    job_id = new_id("ftjob")
    task = body.suffix or f"ft-{job_id.removeprefix('ftjob-')}"
    if body.suffix is not None:
        _check_suffix(task, state.base.info.name)
    check_task(caller, task)
    start = await _pin(state, caller, body.model, keeps_kv=method_of(body) in KV_METHODS)
    try:
        options = options_of(body, start.prompt.num_virtual_tokens if start else None)
        initial = save({"prompt": start.prompt.tensor.contiguous()}) if start else None
        model = start.version.reference if start else body.model
    finally:
        if start is not None:
            start.release()
    check_publishing(caller, options.alias)
    files = [
        state.files.path((await find_file(state, caller, file)).id) if file else None
        for file in (body.training_file, body.validation_file)
    ]
    job = Job(
        id=job_id,
        created_at=int(time.time()),
        owner=caller.actor,
        tenant=caller.tenant,
        model=model,
        task=task,
        training_file=body.training_file,
        validation_file=body.validation_file,
        seed=body.seed or 0,
        metadata=body.metadata or {},
        asked=shown(body),
        options=options,
    )
    assert files[0] is not None
    await state.storing.run(partial(state.jobs.create, job, files[0], files[1], initial))
    request.state.target = f"{job.id} {task}"
    state.training.wake()
    return _reply(job)


@router.get("", response_model=Page[JobReply])
async def list_fine_tuning_jobs(
    request: Request, state: StateDep, caller: CallerDep, limit: Limit = 20, after: After = None
) -> Any:
    """The newest first. `metadata[key]=value` keeps those that have it."""
    wanted = {
        name[len("metadata[") : -1]: value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    jobs = [
        job
        for job in await state.storing.run(state.jobs.all)
        if is_theirs(caller, job)
        and caller.sees(job.task)
        and (after is None or job.id < after)
        and wanted.items() <= job.metadata.items()
    ]
    return paged([_reply(job) for job in jobs], limit)


@router.get("/{job}", response_model=JobReply)
async def retrieve_fine_tuning_job(job: JobDep) -> Any:
    return _reply(job)


@router.get("/{job}/events", response_model=Page[EventReply])
async def list_fine_tuning_events(job: JobDep, state: StateDep, limit: Limit = 20, after: After = None) -> Any:
    """What happened, the newest first."""
    events = await state.storing.run(partial(state.jobs.events, job.id))
    rest = [_event_reply(event) for event in events if after is None or event.id < after]
    return paged(rest, limit)


@router.get("/{job}/checkpoints", response_model=Page[CheckpointReply])
async def list_fine_tuning_checkpoints(job: JobDep, limit: Limit = 10, after: After = None) -> Any:
    """The one that was kept and published: that with the least validation loss. None before the job has succeeded."""
    found = [] if job.fine_tuned_model is None or after is not None else [_checkpoint_reply(job)]
    return paged(found, limit)


@router.get(
    "/{job}/report",
    response_class=HTMLResponse,
    responses={200: {"content": {"text/html": {}}, "description": "A page"}},
)
async def retrieve_fine_tuning_report(job: JobDep, state: StateDep) -> HTMLResponse:
    """What was measured of the published version, as a page of HTML that needs nothing else.

    Scores with intervals, confusion matrix and reliability of labels, the loss by step, and what the gate said. 400
    before the job has succeeded.
    """
    return HTMLResponse(await state.storing.run(lambda: page(job, state.jobs.evaluation(job.id))), headers=_PAGE)


@router.post("/{job}/cancel", response_model=JobReply)
async def cancel_fine_tuning_job(job: JobDep, state: StateDep) -> Any:
    """For good, and at once; nothing is published."""
    return await _change(state, job, partial(cancelled, now=int(time.time())), "The job was cancelled")


@router.post("/{job}/pause", response_model=JobReply)
async def pause_fine_tuning_job(job: JobDep, state: StateDep) -> Any:
    """Save a checkpoint and make room for others until the job is resumed."""
    return await _change(state, job, paused, "The job was paused")


@router.post("/{job}/resume", response_model=JobReply)
async def resume_fine_tuning_job(job: JobDep, state: StateDep) -> Any:
    """Go on from the last checkpoint, when it is its turn again."""
    return await _change(state, job, resumed, "The job was resumed")


async def _change(state: State, job: Job, change: Callable[[Job], Job], told: str) -> dict[str, Any]:
    after = await state.storing.run(partial(state.jobs.change, job.id, change))
    await state.storing.run(partial(state.jobs.tell, job.id, "info", told))
    state.training.wake()
    return _reply(after)


async def _pin(state: State, caller: Caller, model: str, *, keeps_kv: bool) -> Pin | None:
    """The soft prompt to start from; None for the base model. To be released."""
    if model == state.base.info.name:
        return None  # which every job needs: no key must have it among its tasks
    check_reference(caller, model, state.base.info.name)
    pin = await state.loading.run(partial(state.registry.pin, model))
    if pin.prompt.kind != "embedding" and not keeps_kv:
        pin.release()
        raise InvalidRequest(
            f"only {' and '.join(KV_METHODS)} can start from keys and values, others need virtual tokens", param="model"
        )
    return pin


def _check_suffix(task: str, base_name: str) -> None:
    try:
        check_task_name(task)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param="suffix") from None
    if task == base_name:
        raise InvalidRequest("this name is the base model's", param="suffix")


def _reply(job: Job) -> dict[str, Any]:
    error = job.error and {"code": job.error.code, "message": job.error.message, "param": job.error.param}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "estimated_finish": job.estimated_finish,
        "status": job.status,
        "error": error,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.tenant or "softprompt",
        "task": job.task,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": [],
        "seed": job.seed,
        "trained_tokens": job.trained_tokens or None,
        "step": job.step,
        "max_steps": job.max_steps,
        "hyperparameters": job.asked["hyperparameters"],
        "method": job.asked["method"],
        "metadata": job.metadata,
        "integrations": [],
        "data": job.data,
        "metrics": job.result.get("metrics"),
        "gate": job.result.get("gate"),
    }


def _event_reply(event: Event) -> dict[str, Any]:
    return {"object": "fine_tuning.job.event", **vars(event)}


def _checkpoint_reply(job: Job) -> dict[str, Any]:
    step = job.report["best_step"]
    kept: dict[str, float] = next((point for point in job.report["curve"] if point["step"] == step), {})
    losses = {name: kept[name] for name in ("train_loss",) if name in kept}  # the start has none
    return {
        "id": f"ftckpt-{job.id.removeprefix('ftjob-')}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": job.finished_at,
        "fine_tuned_model_checkpoint": job.fine_tuned_model,
        "fine_tuning_job_id": job.id,
        "metrics": {"step": step, "valid_loss": job.report["best_validation_loss"], **losses},
        "step_number": step,
    }
