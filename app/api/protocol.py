"""uvicorn's HTTP/1.1 connection with what it lacks.

Clients that send or read too slowly are cut, heads have limits that hold, what two servers could understand differently
is refused, and errors have the body that they have everywhere.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import uuid
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from app.api.body import MIN_RATE
from app.api.errors import problem_body
from app.errors import HeadTooLarge, InvalidRequest, Overloaded, RequestTimeout, SoftpromptError

log = logging.getLogger(__name__)

MAX_HEAD = 65_536  # bytes of a request's head
MAX_HEADERS = 100
FREE_CHUNKS = 1_000  # of any size; more must hold this many bytes on average:
MIN_CHUNK = 16
LINGER = 1.0  # seconds in which a client may read why it was refused, while what it still sends is thrown away

_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=:%\[\]-]{0,300}")  # RFC 3986, section 3.2, without user names


class _Connection(h11.Connection):
    """h11's, stricter."""

    method = b""  # of the last request

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.method = event.method
            self._num_chunks = self._num_bytes = 0  # of its body
            _check_head(event)
        elif isinstance(event, h11.Data):
            self._num_chunks += event.chunk_start
            self._num_bytes += len(event.data)
            # Each costs as much time as kilobytes in one piece do, in the loop that serves everybody.
            if self._num_chunks > FREE_CHUNKS + self._num_bytes / MIN_CHUNK:
                raise h11.RemoteProtocolError("chunks too small")
        return event


def _check_head(head: h11.Request) -> None:
    """Raises RemoteProtocolError."""
    # NOTE: h11 limits a head that is not whole; one that arrives at once may be as large as what a socket holds.
    size = len(head.target) + sum(len(name) + len(value) for name, value in head.headers)
    if size > MAX_HEAD or len(head.headers) > MAX_HEADERS:
        raise h11.RemoteProtocolError("head too large", error_status_hint=431)
    names = {bytes(name) for name, _ in head.headers}
    # A proxy that goes by the other of the two would see other requests behind this one (RFC 9112, section 6.1).
    if b"transfer-encoding" in names and (b"content-length" in names or head.http_version != b"1.1"):
        raise h11.RemoteProtocolError("ambiguous length")
    if not head.http_version.startswith(b"1."):
        raise h11.RemoteProtocolError("not HTTP/1")
    if not all(_HOST.fullmatch(value) for name, value in head.headers if name == b"host"):
        raise h11.RemoteProtocolError("not a host")


class Protocol(H11Protocol):
    """One connection.

    A head must be whole `receive_timeout` seconds after the connection was opened or the head was begun. A body that
    nobody reads any more, because the reply is complete, gets as long. (`app.api.body` times those that are read.)
    What is written must be taken in `send_timeout` seconds, and in those that its size earns it at MIN_RATE.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        receive_timeout: float,
        send_timeout: float,
        max_connections: int,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn: _Connection = _Connection(h11.SERVER, MAX_HEAD)
        self._receive_timeout = receive_timeout
        self._send_timeout = send_timeout
        self._max_connections = max_connections
        self._deadline: asyncio.TimerHandle | None = None  # for what the client sends
        self._taking: asyncio.TimerHandle | None = None  # for what it takes
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            self._refuse(Overloaded("there are too many connections"))
            self.transport.close()
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        self._taken()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        self._read_on()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_the_last()
        self._watch()

    def pause_writing(self) -> None:
        """More is written than the client has taken, which the transport keeps: a whole plain reply, maybe."""
        super().pause_writing()
        seconds = self._send_timeout + self.transport.get_write_buffer_size() / MIN_RATE
        self._taking = self.loop.call_later(seconds, self._on_untaken)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._taken()
        self.transport.set_write_buffer_limits()

    def send_400_response(self, msg: str) -> None:
        """What h11 does not understand; called while its exception is being handled."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self._refuse(HeadTooLarge("the request's head is too large"))
        else:
            self._refuse(InvalidRequest("this is no valid HTTP/1.1 request", code="invalid_http"))

    def _read_on(self) -> None:
        """See a client leave although it has sent more than its request.

        uvicorn stops reading there until the reply is complete, and who does not read learns of no end.
        """
        if self._refused or self.conn.their_state not in (h11.DONE, h11.MIGHT_SWITCH_PROTOCOL):  # type: ignore[attr-defined]
            return
        self.flow.resume_reading()
        if len(self.conn.trailing_data[0]) > MAX_HEAD:
            self._refuse(InvalidRequest("too much was sent before the reply to this request", code="invalid_http"))

    def _watch(self) -> None:
        """Set the clock while the client owes us bytes that nobody else waits for, and stop it otherwise."""
        if self._refused:
            return
        their_state = self.conn.their_state
        # Between two requests uvicorn's own timer runs, until the next one begins.
        begins = their_state is h11.IDLE and self.timeout_keep_alive_task is None
        unread = their_state is h11.SEND_BODY and self.conn.our_state in (h11.DONE, h11.MUST_CLOSE)
        if not (begins or unread) or self.transport.is_closing():
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self._receive_timeout, self._on_deadline)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _watch_the_last(self) -> None:
        """Have `pause_writing` called for what is left of a reply; by itself a transport does so from 64 KiB on."""
        if self.transport.get_write_buffer_size():
            self.transport.set_write_buffer_limits(high=0)

    def _taken(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _on_untaken(self) -> None:
        # NOTE: not close, which waits until the client has taken everything.
        log.info("a client takes its reply too slowly: the connection is cut")
        self.transport.abort()

    def _on_deadline(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(RequestTimeout("the request's head took too long to arrive"))
        else:
            self.transport.close()

    def _refuse(self, error: SoftpromptError) -> None:
        """Reply where no reply has begun, and close.

        To close at once would have the kernel throw away the reply too, if there is more to read.
        """
        log.info("a connection is closed: %s", error.message)
        if self.cycle is not None:
            self.cycle.disconnected = True  # its application must not reply as well
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            request_id = uuid.uuid4().hex
            body = json.dumps(problem_body(error, request_id)).encode()
            headers = [
                ("Content-Type", "application/problem+json"),
                ("Content-Length", str(len(body))),
                ("X-Request-Id", request_id),
                ("Connection", "close"),
            ]
            reason = error.title.encode()
            events = (
                h11.Response(status_code=error.status, headers=headers, reason=reason),
                h11.Data(data=b"" if self.conn.method == b"HEAD" else body),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self._refused = True
        self._unwatch()
        self._watch_the_last()
        self.transport.write_eof()
        self._deadline = self.loop.call_later(LINGER, self.transport.close)
