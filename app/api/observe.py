"""One log line for every request when it has ended, and its place in the metrics and in its trace."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from app.api.counts import Counts
from app.api.request_stats import RequestStats
from app.api.tracing import Tracing
from app.errors import NotReady, SoftpromptError

log = logging.getLogger("softprompt.access")

MAX_PATH = 300  # characters
QUIET = {"livez", "readyz", "health", "metrics"}  # operations that something asks for all day


class ObserveMiddleware:
    def __init__(self, app: ASGIApp, *, counts: Counts, tracing: Tracing | None) -> None:
        self._app = app
        self._counts = counts
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        state: dict[str, Any] = scope["state"]
        stats = state["stats"] = RequestStats(self._counts)
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        # Of every line that is logged for this request, whoever logs it.
        with bound_contextvars(request_id=state["request_id"], **(self._tracing.ids() if self._tracing else {})):
            try:
                await self._app(scope, receive, watched)
            except asyncio.CancelledError:  # the server ends and has waited long enough
                stats.fails(NotReady("the server ends"))
                raise
            except Exception:
                stats.fails(SoftpromptError("uvicorn logs it"))
                raise
            finally:
                operation = getattr(scope.get("route"), "name", None) or "none"
                stats.ends(operation, status)
                seconds = time.monotonic() - began
                if self._tracing is not None:
                    self._tracing.describe(operation, stats, seconds)
                _log(scope, operation, stats, status, seconds)


def _log(scope: Scope, operation: str, stats: RequestStats, status: int, seconds: float) -> None:
    quiet = operation in QUIET and status < 400
    level = logging.DEBUG if quiet else logging.WARNING if status >= 500 else logging.INFO
    if not log.isEnabledFor(level):
        return
    path = scope["path"][:MAX_PATH]
    line = {
        "method": scope["method"],
        "path": path,
        "operation": operation,
        "status": status,
        "duration": round(seconds, 6),  # seconds
        **_caller(scope["state"]),
        **_generation(stats),
        "error": stats.error_code,
        "cut": stats.cause,
        "prompts": stats.prompts or None,
    }
    # NOTE: the path is no part of the message: it is what a client makes it, and fields are escaped.
    log.log(level, "request", extra={name: value for name, value in line.items() if value is not None})


def _caller(state: dict[str, Any]) -> dict[str, Any]:
    caller = state.get("caller")
    return {"key": caller.actor} if caller is not None and caller.key is not None else {}


def _generation(stats: RequestStats) -> dict[str, Any]:
    """Of an ensemble, its members' in their order."""
    versions = [version for version in stats.versions if version is not None]
    found: dict[str, Any] = {"model": stats.reference}
    if versions:
        found["task"] = ",".join(version.task for version in versions)
        found["version"] = versions[0].number if len(versions) == 1 else [version.number for version in versions]
        found["digest"] = ",".join(version.digest for version in versions)
    if stats.is_admitted:
        found["prompt_tokens"] = stats.num_prompt_tokens
        found["completion_tokens"] = stats.num_generated_tokens
        found["cached_tokens"] = stats.num_cached_tokens
    return found
