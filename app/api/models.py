"""GET /v1/models: the base model, then one entry per task, as OpenAI clients list them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from fastapi import APIRouter

from app.api.access import CallerDep
from app.api.deps import State, StateDep
from app.api.schemas import Model, Page
from app.registry import DEFAULT_ALIAS, Task, Version

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", response_model=Page[Model])
async def list_models(state: StateDep, caller: CallerDep) -> Any:
    """The base model first, then every task with the version that its name stands for."""
    base = [_base_entry(state)] if caller.sees(state.base.info.name) else []
    tasks = [_task_entry(state, task) for task in state.registry.tasks() if caller.sees(task.name)]
    return {"object": "list", "data": [*base, *tasks], "has_more": False}


@router.get("/{reference:path}", response_model=Model)
async def get_model(reference: str, state: StateDep) -> Any:
    """One entry, by any reference or the base model's id."""
    if reference == state.base.info.name:
        return _base_entry(state)
    version = state.registry.resolve(reference)
    return _version_entry(state, reference, state.registry.task(version.task), version)


def _base_entry(state: State) -> dict[str, Any]:
    return {
        "id": state.base.info.name,
        "object": "model",
        "created": state.started_at,
        "owned_by": "softprompt",
        "parent": None,
        "task": None,
        "version": None,
        "digest": None,
        "aliases": [],
        "num_virtual_tokens": 0,
        "max_model_len": state.base.info.max_model_len,
    }


def _version_entry(state: State, reference: str, task: Task, version: Version) -> dict[str, Any]:
    return {
        **_base_entry(state),
        "id": reference,
        "created": int(datetime.fromisoformat(version.created_at).timestamp()),
        "parent": state.base.info.name,
        "task": task.name,
        "version": version.number,
        "digest": version.digest,
        "aliases": [alias.name for alias in task.aliases.values() if version.number in alias.target.numbers],
        "num_virtual_tokens": version.manifest.num_virtual_tokens,
    }


def _task_entry(state: State, task: Task) -> dict[str, Any]:
    """A task without its default alias is listed under its newest version, the name of which always works."""
    alias = task.aliases.get(DEFAULT_ALIAS)
    if alias is not None:
        return _version_entry(state, task.name, task, task.versions[alias.version])
    newest = max(task.versions)
    return _version_entry(state, task.versions[newest].reference, task, task.versions[newest])
