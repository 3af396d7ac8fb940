"""How long a request may take once it has been read; what is late is ended, wherever it stands, and told so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import anyio
from fastapi import Depends, Header

from app.api.deps import StateDep
from app.errors import InvalidRequest, RequestTimedOut

HEADER = "X-Request-Timeout"

_Timeout = Annotated[
    float | None,
    Header(
        alias=HEADER,
        gt=0,
        allow_inf_nan=False,
        description="Seconds until this request is given up with 504 `deadline_exceeded`, those in the queue "
        "included; at most the server's own limit, which holds without it",
    ),
]


async def _deadline(state: StateDep, timeout: _Timeout = None) -> float:
    """On the event loop's clock."""
    limit = state.settings.request_timeout
    if timeout is not None and timeout > limit:
        raise InvalidRequest(f"{HEADER}: at most {limit:g} seconds here", param=HEADER)
    return anyio.current_time() + (limit if timeout is None else timeout)


DeadlineDep = Annotated[float, Depends(_deadline)]


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """Raises RequestTimedOut when the time has come. A thread that works for the request is waited for."""
    # NOTE: not asyncio.timeout, which would leave a thread behind, and with it the pin that it takes.
    with anyio.CancelScope(deadline=deadline) as scope:
        yield
    if scope.cancelled_caught:
        raise RequestTimedOut("the request took longer than it may")
