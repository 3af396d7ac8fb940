"""What is done when a request has ended, however it ended: its place given back, its limits told, its change noted."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.access import AuditEntry, Caller
from app.api.deps import State
from app.api.scopes import NEEDS

CHANGES = ("prompts:write", "aliases:write", "jobs", "admin")  # scopes of which everything but reading is noted


class SettleMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: dict[str, Any] = scope.setdefault("state", {})
        status = 500

        async def limited(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                caller: Caller | None = state.get("caller")
                if caller is not None and caller.meter is not None:
                    MutableHeaders(scope=message).update(caller.meter.headers())
            await send(message)

        try:
            await self._app(scope, receive, limited)
        finally:
            place = state.get("place")
            if place is not None:
                place.leave()
            _note(scope, state, status)


def _note(scope: Scope, state: dict[str, Any], status: int) -> None:
    caller: Caller | None = state.get("caller")
    if caller is None:
        return
    action = scope["route"].name
    is_change = NEEDS.get(action) in CHANGES and scope["method"] not in ("GET", "HEAD") and status != 429
    if is_change or status == 403:
        server: State = state["server"]
        server.access.audit(
            AuditEntry.now(
                request_id=state["request_id"],
                key_id=caller.actor,
                action=action,
                target=state.get("target") or _target(scope["path_params"]),
                status=status,
            )
        )


def _target(params: dict[str, str]) -> str:
    """What a path names: a file, a job, or as a reference task, task:7 or task@prod."""
    target = next((params[name] for name in ("task", "reference", "file", "job") if name in params), "")
    for name, separator in (("version", ":"), ("alias", "@"), ("name", "/")):
        if name in params:
            target += separator + params[name]
    return target
