"""Streaming clients that cost next to nothing: one connection a row, bytes counted, hardly anything parsed.

Server and client share the machine's cores, so whatever the client does is taken from the server.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EVENT = b"data: "
DONE = b"data: [DONE]"
END = b"0\r\n\r\n"  # of a chunked body
SHOWN = 8  # answers whose texts are kept
TAIL = 4096  # bytes of a stream that are kept, for the usage at its end
COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass
class Answer:
    """One stream as it went over the wire."""

    seconds_to_first: float
    tokens: int
    sent: int
    received: int
    body: bytes  # of streams that were asked to be kept


class StreamFailed(Exception):
    """A reply that is not a whole stream."""


class Connection(asyncio.Protocol):
    """Keep-alive; one request at a time."""

    _transport: asyncio.Transport
    _done: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self, request: bytes, *, keep: bool = False) -> asyncio.Future[Answer]:
        self._done = asyncio.get_running_loop().create_future()
        self._sent, self._received, self._first, self._tail = len(request), 0, 0.0, b""
        self._kept: list[bytes] | None = [] if keep else None
        self._began = time.perf_counter()
        self._transport.write(request)
        return self._done

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if self._kept is not None:
            self._kept.append(data)
        self._tail = (self._tail + data)[-TAIL:]
        if not self._first and EVENT in self._tail:
            self._first = time.perf_counter()
        if not self._tail.endswith(END) or self._done is None:
            # A refusal has no chunked body.
            if not self._first and self._received >= 16 and b" 200 " not in self._tail[:16]:
                self._fail(self._tail)
            return
        usage = COMPLETION_TOKENS.findall(self._tail)
        if DONE not in self._tail or not usage:
            self._fail(self._tail)
            return
        answer = Answer(
            self._first - self._began, int(usage[-1]), self._sent, self._received, b"".join(self._kept or [])
        )
        self._done.set_result(answer)
        self._done = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection was lost: {exc}".encode())

    def _fail(self, reason: bytes) -> None:
        if self._done is not None:
            self._done.set_exception(StreamFailed(reason.decode(errors="replace")[:2000]))
            self._done = None


def post(port: int, path: str, body: bytes) -> bytes:
    """The bytes of a request, made before the clock runs."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def text_of(stream: bytes) -> str:
    """What the events of a chunked reply say, of `/v1/generate` or of `/v1/completions` (`choices`)."""
    _, _, rest = stream.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            break
        body, rest = body + rest[:length], rest[length + 2 :]
    text = ""
    for line in body.splitlines():
        if line.startswith(EVENT) and line != DONE:
            event = json.loads(line.removeprefix(EVENT))
            text += "".join(piece.get("text") or "" for piece in event.get("choices", [event]))
    return text


async def _run(port: int, requests: Sequence[bytes], rows: int) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    connections = [(await loop.create_connection(Connection, "127.0.0.1", port))[1] for _ in range(rows)]
    answers: list[Answer | None] = [None] * len(requests)
    todo = iter(range(len(requests)))

    async def row(connection: Connection) -> None:
        for i in todo:
            answers[i] = await connection.ask(requests[i], keep=i < SHOWN)

    began = time.perf_counter()
    try:
        await asyncio.gather(*map(row, connections))
        seconds = time.perf_counter() - began
    finally:
        for connection in connections:
            connection._transport.close()
    whole = [answer for answer in answers if answer is not None]
    return {
        "seconds": seconds,
        "tokens": sum(answer.tokens for answer in whole),
        "ttft": [answer.seconds_to_first for answer in whole],
        "token_counts": sorted({answer.tokens for answer in whole}),
        "texts": [text_of(answer.body) for answer in whole[:SHOWN]],
        "bytes_sent": sum(answer.sent for answer in whole),
        "bytes_received": sum(answer.received for answer in whole),
    }


def run(port: int, requests: Sequence[bytes], rows: int) -> dict[str, Any]:
    """Send every request, `rows` at a time. Raises StreamFailed."""
    return asyncio.run(_run(port, requests, rows))
