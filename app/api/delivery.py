"""The answers to one request on their way to the client: as a stream or as one reply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response

from app.api.concurrency import disconnection, first
from app.api.deps import get_stats
from app.api.json_text import dump_json
from app.api.stream import Emit, EventStream


class Run(Protocol):
    """Answers that have started."""

    async def whole(self) -> dict[str, Any]:
        """The plain reply."""

    async def stream(self, emit: Emit) -> None:
        """The same in events."""

    async def aclose(self) -> None:
        """End what has not ended."""


async def deliver(
    run: Run, request: Request, *, stream: bool, send_timeout: float, deadline: float, headers: Mapping[str, str]
) -> Response:
    """Takes over `run` and closes it. Raises ClientDisconnect and what `Run.whole` does."""
    if stream:
        return EventStream(
            run.stream,
            run.aclose,
            send_timeout=send_timeout,
            deadline=deadline,
            headers=headers,
            stats=get_stats(request),
        )
    try:
        reply = await first(run.whole(), disconnection(request.receive))
    finally:
        await run.aclose()
    return Response(dump_json(reply), headers=headers, media_type="application/json")
