"""multipart/form-data (RFC 7578), read in memory: no part is held whose name is not expected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.api.body import read_chunks
from app.api.deps import get_state
from app.errors import InvalidRequest

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks


@dataclass
class Part:
    file_name: str  # the client's, "" if there is none
    data: bytearray = field(default_factory=bytearray)


async def read_form(request: Request, limit: int, names: Sequence[str], *, required: Sequence[str]) -> dict[str, Part]:
    """The parts by name, each once. `limit` is for the whole body.

    Raises BodyTooLarge, RequestTimeout, and InvalidRequest for parts of other names and where one is missing.
    """
    _, options = parse_options_header(request.headers["content-type"])
    boundary = options.get(b"boundary")
    if not boundary:
        raise InvalidRequest("the multipart body has no boundary")
    form = _Form(boundary, names)
    async for chunk in read_chunks(request, limit, get_state(request).settings.receive_timeout):
        form.feed(chunk)
    parts = form.finish()
    for name in required:
        if name not in parts:
            raise InvalidRequest(f"the part {name} is missing", param=name)
    return parts


class _Form:
    """Collects the expected parts of a multipart/form-data body (RFC 7578) in memory."""

    def __init__(self, boundary: bytes, names: Sequence[str]) -> None:
        self._names = names
        self._parts: dict[str, Part] = {}
        self._field = self._value = b""  # of the part header being read
        self._disposition = b""  # of the part being read
        self._data = bytearray()
        self._ended = False
        callbacks: MultipartCallbacks = {
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_end": self._on_end,
        }
        with _multipart_errors():
            self._parser = MultipartParser(boundary, callbacks)

    def feed(self, chunk: bytes) -> None:
        with _multipart_errors():
            self._parser.write(chunk)

    def finish(self) -> dict[str, Part]:
        if not self._ended:
            raise InvalidRequest("the multipart body ends before its last boundary")
        return self._parts

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("latin-1")
        if name not in self._names:
            raise InvalidRequest(f"a part is named none of {', '.join(self._names)}")
        if name in self._parts:
            raise InvalidRequest(f"the part {name} occurs twice", param=name)
        part = self._parts[name] = Part(options.get(b"filename", b"").decode("utf-8", "replace"))
        self._data = part.data
        self._disposition = b""

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _on_end(self) -> None:
        self._ended = True


@contextmanager
def _multipart_errors() -> Iterator[None]:
    try:
        yield
    except FormParserError:
        raise InvalidRequest("the body is not valid multipart/form-data") from None
