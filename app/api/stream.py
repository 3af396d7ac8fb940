"""Server-sent events (WHATWG HTML, section 9.2), pushed: whoever produces an event waits until it is on its way.

A client that leaves, or that stops reading for `send_timeout` seconds, ends the production; so does the deadline.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app.api.concurrency import disconnection, first
from app.api.deadline import until
from app.api.errors import error_object, unexpected
from app.api.json_text import dump_json
from app.api.request_stats import RequestStats
from app.errors import SoftpromptError

log = logging.getLogger(__name__)

PING_INTERVAL = 15.0  # seconds of silence until a comment keeps proxies from closing the connection

Emit = Callable[[Mapping[str, Any]], Awaitable[None]]


class _ReaderStalled(Exception):
    """The client is there but takes nothing."""


class EventStream(Response):
    """Sends what `produce` emits, then `[DONE]`; an error of `produce` becomes an event before it.

    `close` is awaited exactly once, however the stream ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        produce: Callable[[Emit], Awaitable[None]],
        close: Callable[[], Awaitable[None]],
        *,
        send_timeout: float,
        deadline: float = math.inf,
        headers: Mapping[str, str],
        stats: RequestStats,
        ping_interval: float = PING_INTERVAL,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._produce = produce
        self._close = close
        self._send_timeout = send_timeout
        self._deadline = deadline
        self._stats = stats
        self._ping_interval = ping_interval
        self._sending = asyncio.Lock()
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        try:
            await first(self._run(), self._ping(), disconnection(receive))
        except ClientDisconnect:
            self._stats.cause = "disconnect"
            log.debug("the client left a stream")
        except _ReaderStalled:
            self._stats.cause = "slow_reader"
            log.info("a client took nothing for %g s: its stream is cut", self._send_timeout)
        finally:
            await self._close()

    async def _run(self) -> None:
        await self._write({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            with until(self._deadline):
                await self._produce(self._emit)
        except _ReaderStalled:
            raise
        except Exception as error:
            failure = error if isinstance(error, SoftpromptError) else unexpected(error)
            self._stats.fails(failure)
            await self._emit({"error": error_object(failure)})
        await self._write({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        await self._write({"type": "http.response.body", "body": b"", "more_body": False})

    async def _emit(self, event: Mapping[str, Any]) -> None:
        # NOTE: ASCII, because some clients take U+2028 and U+0085 for ends of lines.
        data = b"data: " + dump_json(event, ascii_only=True) + b"\n\n"
        await self._write({"type": "http.response.body", "body": data, "more_body": True})

    async def _ping(self) -> None:
        clock = asyncio.get_running_loop().time
        self._last_sent = clock()
        while True:
            await asyncio.sleep(self._last_sent + self._ping_interval - clock())
            if clock() >= self._last_sent + self._ping_interval:
                await self._write({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})

    async def _write(self, message: Message) -> None:
        async with self._sending:
            try:
                async with asyncio.timeout(self._send_timeout):
                    await self._send(message)
            except TimeoutError:
                raise _ReaderStalled from None
            self._last_sent = asyncio.get_running_loop().time()
