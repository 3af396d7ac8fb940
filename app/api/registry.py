"""Tasks, their versions and aliases over HTTP."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import JSONResponse, Response

from app.api.access import CallerDep
from app.api.body import JsonRoute
from app.api.deps import StateDep
from app.api.paging import After, Limit, after_number, paged
from app.api.preconditions import CACHED, etag, is_unchanged
from app.api.registry_schemas import Deleted, PublishReply, TaskReply, VersionReply
from app.api.schemas import Page
from app.api.upload import UPLOAD_BODY, Upload, read_upload, upload_place
from app.checkpoint import Checkpoint, read_checkpoint, read_manifest
from app.engine import Engine
from app.errors import (
    ContextLengthExceeded,
    InvalidPromptFile,
    NotReady,
    NumericalError,
    ReferenceNotFound,
)
from app.manifest import ManifestInput
from app.registry import DEFAULT_ALIAS, Registry, Task, Version, parse_reference
from app.registry.reference import check_alias_name, check_task_name, not_found
from app.soft_prompt import BaseInfo, SoftPrompt

router = APIRouter(route_class=JsonRoute, prefix="/v1/tasks", tags=["registry"])

Tag = Annotated[str | None, Query(max_length=401, description="`key` or `key=value`")]


async def find_version(
    task: str, version: Annotated[str, Path(description="A version number")], state: StateDep
) -> Version:
    # A reference is checked whole, so a malformed number is the same 404 as an unknown one.
    return state.registry.resolve(f"{task}:{version}")


VersionDep = Annotated[Version, Depends(find_version)]


@router.get("", response_model=Page[TaskReply])
async def list_tasks(
    state: StateDep, caller: CallerDep, limit: Limit = 100, after: After = None, tag: Tag = None
) -> Any:
    """Tasks by name; with `tag`, those of which a version has it."""
    tasks = [
        task
        for task in state.registry.tasks()
        if caller.sees(task.name)
        and (after is None or task.name > after)
        and any(_has_tag(version, tag) for version in task.versions.values())
    ]
    return paged([_task_reply(task) for task in tasks], limit)


@router.get("/{task}", response_model=TaskReply)
async def get_task(task: str, state: StateDep) -> Any:
    return _task_reply(state.registry.task(task))


@router.delete("/{task}", response_model=Deleted)
async def delete_task(task: str, state: StateDep, caller: CallerDep) -> Any:
    """Delete a task and all its versions; each can be restored. Refused with 412 while an alias besides `latest` is
    there."""
    deleted = await state.storing.run(partial(state.registry.delete_task, task, actor=caller.actor))
    for version in deleted:
        await _unload(state.engine, version)
    return {"id": task, "object": "task", "deleted": True}


@router.get("/{task}/versions", response_model=Page[VersionReply])
async def list_versions(
    task: str,
    state: StateDep,
    limit: Limit = 100,
    after: After = None,
    tag: Tag = None,
    deleted: Annotated[bool, Query(description="Instead those that are deleted and can be restored")] = False,
) -> Any:
    """Versions by number, with `after` those above it."""
    found: dict[Version, str | None]
    if deleted:
        found = {item.version: item.deleted_at for item in state.registry.deleted_versions(task)}
    else:
        found = dict.fromkeys(state.registry.task(task).versions.values())
    above = after_number(after, "version") or 0
    versions = [
        _version_reply(version, state.registry, deleted_at)
        for version, deleted_at in found.items()
        if version.number > above and _has_tag(version, tag)
    ]
    return paged(versions, limit)


@router.post(
    "/{task}/versions",
    dependencies=[Depends(upload_place)],
    status_code=201,
    response_model=PublishReply,
    responses={200: {"model": PublishReply, "description": "The task had these files already"}},
    openapi_extra={"requestBody": UPLOAD_BODY},
)
async def publish_version(
    task: str,
    request: Request,
    state: StateDep,
    caller: CallerDep,
    alias: Annotated[str, Query(description="The alias to move; empty: none")] = DEFAULT_ALIAS,
) -> Response:
    """Publish a PEFT checkpoint as a new version, tried on the base model first."""
    check_task_name(task)
    if alias:
        check_alias_name(alias)
        if alias != DEFAULT_ALIAS:
            caller.check_scope("aliases:write")
    upload = await read_upload(request, state.settings.max_upload_bytes)
    checkpoint = await state.storing.run(partial(_check, upload, state.base.info))
    await _try_out(state.engine, checkpoint.prompt)
    publish = partial(state.registry.publish, task, checkpoint, alias=alias or None, actor=caller.actor)
    published = await state.storing.run(publish)
    version = published.version
    reply = {**_version_reply(version, state.registry), "warnings": list(published.warnings)}
    headers = {"Location": f"/v1/tasks/{task}/versions/{version.number}", "ETag": etag(version.digest)}
    return JSONResponse(reply, 201 if published.created else 200, headers)


@router.get("/{task}/versions/{version}", response_model=VersionReply)
async def get_version(version: VersionDep, state: StateDep) -> Any:
    return _version_reply(version, state.registry)


@router.delete("/{task}/versions/{version}", response_model=Deleted)
async def delete_version(
    task: str,
    version: Annotated[str, Path(description="A version number")],
    state: StateDep,
    caller: CallerDep,
) -> Any:
    """Delete a version; requests that use it finish, and it can be restored. 412 while an alias names it."""
    delete = partial(state.registry.delete_version, task, _number(task, version), actor=caller.actor)
    deleted = await state.storing.run(delete)
    await _unload(state.engine, deleted)
    return {"id": deleted.reference, "object": "version", "deleted": True}


@router.post("/{task}/versions/{version}:restore", response_model=VersionReply)
async def restore_version(
    task: str,
    version: Annotated[str, Path(description="The number of a deleted version")],
    state: StateDep,
    caller: CallerDep,
) -> Any:
    """Undo the deletion of a version, until its files are collected. It gets no alias back."""
    restore = partial(state.registry.restore_version, task, _number(task, version), actor=caller.actor)
    restored = await state.storing.run(restore)
    return _version_reply(restored, state.registry)


@router.get(
    "/{task}/versions/{version}/files/{name}",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}, "application/json": {}}},
        304: {"description": "If-None-Match names this file"},
    },
    openapi_extra={"parameters": [CACHED]},
)
async def get_file(name: str, version: VersionDep, request: Request, state: StateDep) -> Response:
    """A file of the PEFT checkpoint as it was uploaded, or its manifest.json."""
    if name not in version.files:
        raise not_found()
    headers = {"ETag": etag(version.files[name]), "Cache-Control": "no-cache"}
    if is_unchanged(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    data = await state.storing.run(partial(state.registry.read_file, version.task, version.number, name))
    media_type = "application/json" if name.endswith(".json") else "application/octet-stream"
    return Response(data, media_type=media_type, headers=headers)


def _number(task: str, version: str) -> int:
    """Of a version that this process need not know of yet."""
    # The reference is checked whole, so a malformed number is the same 404 as an unknown one.
    number = parse_reference(f"{task}:{version}").version
    if number is None:
        raise not_found()
    return number


def _check(upload: Upload, base: BaseInfo) -> Checkpoint:
    manifest = ManifestInput() if upload.manifest is None else read_manifest(upload.manifest)
    return read_checkpoint(upload.config, upload.tensors, manifest, base)


async def _try_out(engine: Engine, prompt: SoftPrompt) -> None:
    """A real forward pass. What is not finite here is the file's fault, not ours."""
    try:
        await engine.load(prompt)
    except NumericalError as error:
        raise InvalidPromptFile(error.message, param="adapter_model", code=error.code) from None
    except ContextLengthExceeded as error:
        raise InvalidPromptFile(error.message, param="adapter_config", code="too_many_virtual_tokens") from None


async def _unload(engine: Engine, version: Version) -> None:
    with suppress(NotReady):  # an engine that does not run holds nothing
        await engine.unload(version.digest)


def _has_tag(version: Version, tag: str | None) -> bool:
    if tag is None:
        return True
    key, given, value = tag.partition("=")
    found = version.manifest.tags.get(key)
    return found is not None and (not given or found == value)


def _task_reply(task: Task) -> dict[str, Any]:
    return {
        "object": "task",
        "task": task.name,
        "versions": list(task.versions),
        "aliases": {alias.name: alias.version for alias in task.aliases.values()},
    }


def _version_reply(version: Version, registry: Registry, deleted_at: str | None = None) -> dict[str, Any]:
    try:
        aliases = list(registry.task(version.task).aliases.values())
    except ReferenceNotFound:  # deleted since the caller found the version
        aliases = []
    return {
        "task": version.task,
        "version": version.number,
        "reference": version.reference,
        "aliases": [alias.name for alias in aliases if version.number in alias.target.numbers],
        "pins": registry.pins(version),
        "deleted_at": deleted_at,
        **version.manifest.model_dump(mode="json"),
    }
