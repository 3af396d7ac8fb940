"""A strict reader of the safetensors header, to run before the library that decodes the tensors.

The format (https://huggingface.co/docs/safetensors): the header's length in 8 little-endian bytes, a JSON
header with each tensor's dtype, shape and byte range, then the data. The library forgives duplicate names,
unknown keys and hundreds of thousands of tensors; this reader does not. What it accepts, the library accepts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from app.errors import InvalidPromptFile
from app.strict_json import parse_object, shorten

ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_RANK = 4

# First bytes of what people upload by mistake.
_FORMATS = {
    b"PK\x03\x04": "a zip archive, such as PyTorch's adapter_model.bin",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\x00": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstandard file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy file",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a Git LFS pointer, not the file it stands for (run `git lfs pull`)",
    b"<": "an HTML or XML page",
    b"{": "a JSON file",
}


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor."""

    dtype: str  # a key of ITEM_SIZES
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SafetensorsHeader:
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(data: bytes, *, max_header_bytes: int, max_tensors: int) -> SafetensorsHeader:
    """Check the whole header against the whole file.

    Raises InvalidPromptFile with code not_safetensors, truncated_file, trailing_bytes, header_too_large,
    invalid_header, too_many_tensors, unsupported_dtype, invalid_shape or invalid_offsets.
    """
    length = int.from_bytes(data[:8], "little")
    # NOTE: a valid length can look like the start of a pickle, so first bytes name a file only when it cannot
    # be safetensors.
    impossible = length > max_header_bytes and length > len(data) - 8
    if len(data) < 8 or impossible or data[8:9] not in (b"{", b""):
        _refuse_other_formats(data)
    if len(data) < 8:
        raise _invalid("truncated_file", f"the file has {len(data)} bytes; a safetensors file has more than 8")
    if length > max_header_bytes:
        raise _invalid("header_too_large", f"the header has {length} bytes but may have {max_header_bytes}")
    if length > len(data) - 8:
        raise _invalid("truncated_file", f"the header has {length} bytes but the file ends after {len(data) - 8}")
    entries, metadata = _parse(data[8 : 8 + length])
    if len(entries) > max_tensors:
        raise _invalid("too_many_tensors", f"the file has {len(entries)} tensors but may have {max_tensors}")
    tensors: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        tensors[name], start, end = _tensor(name, entry)
        ranges.append((start, end, name))
    _check_ranges(sorted(ranges), len(data) - 8 - length)
    return SafetensorsHeader(tensors, metadata)


def _invalid(code: str, message: str) -> InvalidPromptFile:
    return InvalidPromptFile(f"adapter_model.safetensors: {message}", param="adapter_model", code=code)


def _refuse_other_formats(data: bytes) -> None:
    for magic, name in _FORMATS.items():
        if data.startswith(magic):
            raise _invalid(
                "not_safetensors",
                f"this is {name}; upload what PEFT's save_pretrained(..., safe_serialization=True) writes",
            )


def _parse(header: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    # The format allows spaces after the object, as padding, and nothing before it.
    if not (header.startswith(b"{") and header.rstrip(b" ").endswith(b"}")):
        raise _invalid("invalid_header", "the header must begin with { and end with } and padding spaces")
    try:
        entries = parse_object(header)
    except ValueError as error:
        raise _invalid("invalid_header", f"the header is not strict JSON: {error}") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _invalid("invalid_header", "__metadata__ must map strings to strings")
    return entries, metadata


def _tensor(name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _invalid("invalid_header", f"{shorten(name)} must have dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        allowed = ", ".join(ITEM_SIZES)
        raise _invalid("unsupported_dtype", f"{shorten(name)} has dtype {shorten(dtype)} but must have {allowed}")
    if not _integers(shape) or not 1 <= len(shape) <= MAX_RANK or 0 in shape:
        raise _invalid(
            "invalid_shape",
            f"{shorten(name)} has shape {shorten(shape)} but must have 1 to {MAX_RANK} dimensions above 0",
        )
    if not _integers(offsets) or len(offsets) != 2:
        raise _invalid("invalid_offsets", f"{shorten(name)} has data_offsets {shorten(offsets)}; expected two integers")
    start, end = offsets
    size = math.prod(shape) * ITEM_SIZES[dtype]
    if end - start != size:
        raise _invalid("invalid_offsets", f"{shorten(name)} needs {size} bytes but its data_offsets hold {end - start}")
    return TensorInfo(dtype, tuple(shape)), start, end


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_ranges(ranges: list[tuple[int, int, str]], available: int) -> None:
    position = 0
    for start, end, name in ranges:
        if start != position:
            what = "overlaps the tensor before it" if start < position else "leaves a hole before it"
            raise _invalid("invalid_offsets", f"{shorten(name)} starts at byte {start}, not {position}: it {what}")
        position = end
    if position > available:
        raise _invalid("truncated_file", f"the tensors need {position} bytes but {available} are there")
    if position < available:
        raise _invalid("trailing_bytes", f"{available - position} bytes follow the last tensor")
