"""Request bodies: bounded while they are read, and JSON parsed strictly, once, before FastAPI sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from python_multipart.multipart import parse_options_header

from app.api.access import authorise
from app.api.deps import get_state
from app.errors import BodyTooLarge, InvalidRequest, RequestTimeout, UnsupportedMediaType
from app.strict_json import parse_object

MIN_RATE = 10_000  # bytes a second, for what `receive_timeout` is too short


def content_type(request: Request) -> str:
    """The media type in lower case, "" if there is none. Raises UnsupportedMediaType for charsets but UTF-8."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"us-ascii"):
        raise UnsupportedMediaType("the charset must be utf-8")
    return kind.decode("latin-1").lower()


async def read_chunks(request: Request, limit: int, receive_timeout: float) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises BodyTooLarge as soon as it is known to have more than `limit` bytes.

    Raises RequestTimeout if it takes more than `receive_timeout` seconds and is slower than MIN_RATE after them.
    """
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMediaType("a compressed body is not accepted")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise BodyTooLarge(f"the body has {declared} bytes but may have {limit}")
    received = 0
    deadline = asyncio.get_running_loop().time() + receive_timeout
    chunks = request.stream()
    while True:
        try:
            async with asyncio.timeout_at(deadline + received / MIN_RATE):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise RequestTimeout(f"{received} bytes of the body arrived in time, and not the rest") from None
        if chunk is None:
            return
        received += len(chunk)
        if received > limit:
            raise BodyTooLarge(f"the body has more than {limit} bytes")
        yield chunk


class _JsonRequest(Request):
    """A request whose body has been read and parsed."""

    def __init__(self, request: Request, data: bytes, parsed: dict[str, Any]) -> None:
        super().__init__(request.scope, request.receive)
        self._data = data
        self._parsed = parsed

    async def body(self) -> bytes:
        return self._data

    async def json(self) -> Any:
        return self._parsed


class JsonRoute(APIRoute):
    """A route whose body, if it takes one, must be one strict JSON object (see app.strict_json)."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def read_first(request: Request) -> Response:
            await authorise(request)  # before a byte of the body is read
            if content_type(request) != "application/json":
                raise UnsupportedMediaType("the body must be application/json")
            settings = get_state(request).settings
            chunks = read_chunks(request, settings.max_body_bytes, settings.receive_timeout)
            data = b"".join([chunk async for chunk in chunks])
            try:
                parsed = parse_object(data)
            except UnicodeError:
                raise InvalidRequest("the body must be UTF-8, without lone surrogates", code="invalid_json") from None
            except ValueError as error:
                raise InvalidRequest(f"the body must be one JSON object: {error}", code="invalid_json") from None
            return await handle(_JsonRequest(request, data, parsed))

        return read_first
