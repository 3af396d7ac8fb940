"""The files of an upload, out of a multipart body or of one safetensors file that carries them in its metadata.

Nothing is written to disk, and no part is held whose name is not expected.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.api.body import content_type, read_chunks
from app.api.deps import StateDep, get_state
from app.checkpoint import DEFAULT_LIMITS, MAX_MANIFEST_BYTES
from app.errors import BodyTooLarge, InvalidPromptFile, InvalidRequest, UnsupportedMediaType
from app.safetensors_header import read_header

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_OVERHEAD = 2 * MAX_MANIFEST_BYTES  # configuration, manifest and multipart framing
RAW_TYPES = ("application/octet-stream", "application/vnd.safetensors")
_PARTS = ("adapter_model", "adapter_config", "manifest")

# What OpenAPI shows of the body; FastAPI would only write it for a body that it reads itself.
UPLOAD_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["adapter_model", "adapter_config"],
                "properties": {
                    "adapter_model": {"type": "string", "format": "binary"},
                    "adapter_config": {"type": "string", "format": "binary"},
                    "manifest": {"type": "string", "format": "binary"},
                },
            },
            "examples": {
                "peft": {
                    "summary": "The files that PEFT's save_pretrained writes, and a manifest",
                    "value": {
                        "adapter_model": "<adapter_model.safetensors>",
                        "adapter_config": "<adapter_config.json>",
                        "manifest": '{"template": "{input}\\nSentiment:", "labels": ["positive", "negative"]}',
                    },
                }
            },
        },
        "application/octet-stream": {
            "schema": {"type": "string", "format": "binary"},
            "examples": {
                "metadata": {
                    "summary": "One safetensors file with adapter_config (and manifest) in its __metadata__",
                    "value": "<bytes>",
                }
            },
        },
    },
}


@dataclass(frozen=True)
class Upload:
    """Files as they came."""

    config: bytes
    tensors: bytes
    manifest: bytes | None


async def upload_place(state: StateDep) -> AsyncIterator[None]:
    """A dependency of the route: holds a place from before the body is read until the reply. Raises Overloaded."""
    with state.uploads.one():
        yield


async def read_upload(request: Request, max_upload_bytes: int) -> Upload:
    """Raises BodyTooLarge, RequestTimeout, UnsupportedMediaType, InvalidRequest, InvalidPromptFile."""
    kind = content_type(request)
    if kind == "multipart/form-data":
        upload = await _read_multipart(request, max_upload_bytes + MAX_OVERHEAD)
        if len(upload.tensors) > max_upload_bytes:
            raise BodyTooLarge(f"adapter_model has {len(upload.tensors)} bytes but may have {max_upload_bytes}")
        return upload
    if kind in RAW_TYPES:
        return _from_metadata(b"".join([chunk async for chunk in _chunks(request, max_upload_bytes)]))
    raise UnsupportedMediaType(f"the body must be multipart/form-data or {RAW_TYPES[0]}")


def _chunks(request: Request, limit: int) -> AsyncIterator[bytes]:
    return read_chunks(request, limit, get_state(request).settings.receive_timeout)


def _from_metadata(tensors: bytes) -> Upload:
    limits = DEFAULT_LIMITS
    header = read_header(tensors, max_header_bytes=limits.max_header_bytes, max_tensors=limits.max_tensors)
    config, manifest = (header.metadata.get(name) for name in _PARTS[1:])
    if config is None:
        raise InvalidPromptFile(
            'the metadata has no "adapter_config"; it must hold the text of adapter_config.json',
            param="adapter_config",
            code="missing_config",
        )
    return Upload(config.encode(), tensors, None if manifest is None else manifest.encode())


async def _read_multipart(request: Request, limit: int) -> Upload:
    _, options = parse_options_header(request.headers["content-type"])
    boundary = options.get(b"boundary")
    if not boundary:
        raise InvalidRequest("the multipart body has no boundary")
    form = _Form(boundary)
    async for chunk in _chunks(request, limit):
        form.feed(chunk)
    parts = form.finish()
    for name in _PARTS[:2]:
        if name not in parts:
            raise InvalidRequest(f"the part {name} is missing", param=name)
    manifest = parts.get("manifest")
    return Upload(
        bytes(parts["adapter_config"]), bytes(parts["adapter_model"]), None if manifest is None else bytes(manifest)
    )


class _Form:
    """Collects the expected parts of a multipart/form-data body (RFC 7578) in memory."""

    def __init__(self, boundary: bytes) -> None:
        self._parts: dict[str, bytearray] = {}
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

    def finish(self) -> dict[str, bytearray]:
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
        if name not in _PARTS:
            raise InvalidRequest(f"a part is named none of {', '.join(_PARTS)}")
        if name in self._parts:
            raise InvalidRequest(f"the part {name} occurs twice", param=name)
        self._data = self._parts[name] = bytearray()
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
