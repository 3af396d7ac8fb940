"""Aliases over HTTP: moved, split, rolled back and removed, each by compare-and-swap; and a task's history."""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse, Response

from app.api.access import CallerDep
from app.api.body import JsonRoute
from app.api.deps import StateDep
from app.api.paging import After, Limit, after_number, paged
from app.api.preconditions import IF_MATCH, IF_NONE_MATCH, etag, expected_etags
from app.api.registry_schemas import AliasReply, AliasRequest, Deleted, HistoryEntry
from app.api.schemas import Page
from app.errors import PreconditionRequired
from app.registry import Alias, Entry
from app.registry.reference import not_found

router = APIRouter(route_class=JsonRoute, prefix="/v1/tasks/{task}", tags=["registry"])

_ALIAS_EXAMPLES: dict[str, Any] = {
    "move": {"summary": "Serve version 7", "value": {"version": 7}},
    "canary": {"summary": "Serve version 8 to one in ten", "value": {"weights": {"7": 0.9, "8": 0.1}}},
}


@router.get("/aliases/{alias}", response_model=AliasReply)
async def get_alias(task: str, alias: str, state: StateDep) -> Response:
    found = state.registry.task(task).aliases.get(alias)
    if found is None:
        raise not_found()
    return _alias_reply(task, found)


@router.put(
    "/aliases/{alias}",
    response_model=AliasReply,
    responses={201: {"model": AliasReply, "description": "The alias is new"}},
    openapi_extra={"parameters": [IF_MATCH, IF_NONE_MATCH]},
)
async def put_alias(
    task: str,
    alias: str,
    request: Request,
    body: Annotated[AliasRequest, Body(openapi_examples=_ALIAS_EXAMPLES)],
    state: StateDep,
    caller: CallerDep,
) -> Response:
    """Point an alias at a version, or at several by weight, by compare-and-swap.

    Send If-Match with its ETag, or If-None-Match: * for a new alias.
    """
    expected = expected_etags(request)
    versions = {int(number): weight for number, weight in (body.weights or {}).items()} or body.version or 0
    moved = await state.storing.run(
        partial(state.registry.move_alias, task, alias, versions, expected=expected, actor=caller.actor)
    )
    return _alias_reply(task, moved, created=expected is None)


@router.delete("/aliases/{alias}", response_model=Deleted, openapi_extra={"parameters": [IF_MATCH]})
async def delete_alias(task: str, alias: str, request: Request, state: StateDep, caller: CallerDep) -> Any:
    """Remove an alias, by compare-and-swap: If-Match. The versions it names stay."""
    expected = _if_match(request)
    await state.storing.run(partial(state.registry.remove_alias, task, alias, expected=expected, actor=caller.actor))
    return {"id": f"{task}@{alias}", "object": "alias", "deleted": True}


@router.post("/aliases/{alias}:rollback", response_model=AliasReply, openapi_extra={"parameters": [IF_MATCH]})
async def roll_back_alias(task: str, alias: str, request: Request, state: StateDep, caller: CallerDep) -> Response:
    """Point an alias at what it was before its last move, by compare-and-swap: If-Match. Again goes a step further."""
    expected = _if_match(request)
    moved = await state.storing.run(
        partial(state.registry.roll_back_alias, task, alias, expected=expected, actor=caller.actor)
    )
    return _alias_reply(task, moved)


def _if_match(request: Request) -> Container[int]:
    """For what only an alias that exists can be asked."""
    expected = expected_etags(request)
    if expected is None:
        raise PreconditionRequired("send If-Match with the etag of the alias")
    return expected


@router.get("/history", response_model=Page[HistoryEntry])
async def get_history(task: str, state: StateDep, limit: Limit = 100, after: After = None) -> Any:
    """Who changed what and when, the newest first; with `after`, what came before that change."""
    before = after_number(after, "change")
    entries = await state.storing.run(partial(state.registry.history, task, before=before, limit=limit + 1))
    return paged([_change_reply(entry) for entry in entries], limit)


def _alias_reply(task: str, alias: Alias, *, created: bool = False) -> Response:
    reply: dict[str, Any] = {"task": task, "alias": alias.name, "version": alias.version}
    if alias.target.is_split:
        reply["weights"] = _weights(alias.target.weights)
    return JSONResponse(reply, 201 if created else 200, {"ETag": etag(alias.etag)})


def _change_reply(entry: Entry) -> dict[str, Any]:
    """A version that is published moves its alias in the same entry."""
    change = entry.change.model_dump(include={"alias", "version", "weights"})
    weights = change.get("weights")
    return {
        "object": "change",
        "seq": entry.seq,
        "op": entry.op,
        "actor": entry.actor,
        "time": entry.time,
        "alias": change.get("alias"),
        "version": change.get("version") or (weights[0][0] if weights and len(weights) == 1 else None),
        "weights": _weights(weights) if weights and len(weights) > 1 else None,
    }


def _weights(weights: Iterable[tuple[int, float]]) -> dict[str, float]:
    return {str(number): share for number, share in weights}
