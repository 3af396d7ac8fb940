"""Server-sent events (WHATWG HTML, section 9.2) of a generation, synchronous and asynchronous."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx
from pydantic import ValidationError

from app.client.errors import ConnectionFailed, InvalidReply, StreamCut, TimedOut, event_error, shown, translated
from app.client.results import StreamEvent, Usage


class _Events:
    """Bytes in, events out, until `[DONE]`. What is left of the body is read then, else its connection is lost."""

    def __init__(self, response: httpx.Response) -> None:
        kind = response.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise InvalidReply(f"{shown(response.url)} answered {kind or 'something'} instead of a stream")
        self._response = response
        self._buffer = b""
        self.done = False
        self.usage: Usage | None = None  # at the end
        self.version: str | None = response.headers.get("x-prompt-version")  # "task:7"
        self.digest: str | None = response.headers.get("x-prompt-digest")
        self.request_id: str | None = response.headers.get("x-request-id")

    def _feed(self, data: bytes) -> Iterator[StreamEvent]:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            # Every event of this API is one line; a comment keeps the connection open.
            name, _, value = line.rstrip(b"\r").partition(b":")
            if self.done or name != b"data":
                continue
            if value.strip() == b"[DONE]":
                self.done = True
            else:
                yield self._event(value)

    def _event(self, value: bytes) -> StreamEvent:
        try:
            found = json.loads(value)
            if isinstance(found, dict) and "error" in found:
                raise event_error(found["error"], self.request_id)
            event = StreamEvent.model_validate(found)
        except (ValueError, ValidationError) as error:
            raise InvalidReply("the stream has an event that this client does not understand") from error
        if event.usage is not None:
            self.usage = event.usage
        return event

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A connection that breaks here breaks a stream, unless the answer is whole."""
        try:
            with translated():
                yield
        except (ConnectionFailed, TimedOut) as error:
            if self.done:
                return
            if isinstance(error, TimedOut):
                raise
            raise StreamCut(f"the stream was cut: {error.message}") from error
        if not self.done:
            raise StreamCut("the stream ended before its end was said: the answer is not whole")


class Stream(_Events):
    """Iterate over its events. Raises StreamCut, TimedOut, and ServerFailed for an error event."""

    def __iter__(self) -> Iterator[StreamEvent]:
        with self._reading():
            for data in self._response.iter_bytes():
                yield from self._feed(data)


class AsyncStream(_Events):
    """As `Stream`."""

    async def __aiter__(self) -> AsyncIterator[StreamEvent]:
        with self._reading():
            async for data in self._response.aiter_bytes():
                for event in self._feed(data):
                    yield event
