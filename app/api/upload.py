"""The files of an upload, out of a multipart body or of one safetensors file that carries them in its metadata.

Nothing is written to disk, and no part is held whose name is not expected.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from app.api.body import content_type, read_chunks
from app.api.deps import StateDep, get_state
from app.api.multipart import read_form
from app.checkpoint import DEFAULT_LIMITS, MAX_MANIFEST_BYTES
from app.errors import BodyTooLarge, InvalidPromptFile, UnsupportedMediaType
from app.safetensors_header import read_header

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
        receive_timeout = get_state(request).settings.receive_timeout
        chunks = read_chunks(request, max_upload_bytes, receive_timeout)
        return _from_metadata(b"".join([chunk async for chunk in chunks]))
    raise UnsupportedMediaType(f"the body must be multipart/form-data or {RAW_TYPES[0]}")


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
    parts = await read_form(request, limit, _PARTS, required=_PARTS[:2])
    manifest = parts.get("manifest")
    return Upload(
        bytes(parts["adapter_config"].data),
        bytes(parts["adapter_model"].data),
        None if manifest is None else bytes(manifest.data),
    )
