"""The strict header reader against hand-made bad files, and against the library on random ones."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from app.errors import InvalidPromptFile
from app.safetensors_header import SafetensorsHeader, TensorInfo, read_header

DATA = struct.pack("<24f", *range(24))
A = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
B = {"dtype": "F32", "shape": [4, 4], "data_offsets": [32, 96]}
VALID = {"a": A, "b": B}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read(data: bytes) -> SafetensorsHeader:
    return read_header(data, max_header_bytes=64 << 10, max_tensors=64)


def pack(header: Any, data: bytes = DATA) -> bytes:
    """Anything but bytes is written as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def one(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]} | changes}


def metadata(value: Any) -> bytes:
    return pack({"__metadata__": value, **VALID})


def test_what_the_library_writes_is_read() -> None:
    data = save({"x": torch.ones(2, 3), "é": torch.ones(5, dtype=torch.bfloat16)}, metadata={"k": "v"})
    tensors = {"x": TensorInfo("F32", (2, 3)), "é": TensorInfo("BF16", (5,))}
    assert read(data) == SafetensorsHeader(tensors, {"k": "v"})
    assert read(pack(json.dumps(VALID).encode() + b"     ")).tensors.keys() == {"a", "b"}


BAD = [
    ("truncated_file", b""),
    *(("truncated_file", pack(VALID)[:size]) for size in range(1, 9)),
    ("truncated_file", pack(VALID)[:20]),
    ("truncated_file", pack(VALID)[:-1]),
    ("truncated_file", pack(one(shape=[4, 7], data_offsets=[0, 112]))),
    ("truncated_file", pack(one(shape=[1 << 40], data_offsets=[0, 1 << 42]))),
    ("trailing_bytes", pack(VALID) + b"\x00"),
    ("trailing_bytes", pack(VALID) + b"PK\x03\x04"),
    ("trailing_bytes", pack({})),
    ("header_too_large", bytes([0, 0, 1, 1, 0, 0, 0, 0]) + b"{" * 100),
    ("header_too_large", (2**63).to_bytes(8, "little") + b"{}"),
    ("header_too_large", (2**64 - 1).to_bytes(8, "little") + b"{}"),
    ("header_too_large", (100_000_001).to_bytes(8, "little") + b"{}"),
    ("header_too_large", metadata({"k": "v" * 70_000})),
    ("invalid_header", pack(b"")),
    ("invalid_header", pack(b" " + json.dumps(VALID).encode())),
    ("invalid_header", pack(json.dumps(VALID).encode() + b"\x00")),
    ("invalid_header", pack(json.dumps(VALID).encode() + b"\n")),
    ("invalid_header", pack(json.dumps(VALID).encode() + b"{}")),
    ("invalid_header", pack([VALID])),
    ("invalid_header", pack("a")),
    ("invalid_header", pack(b'{"a":\xff}')),
    ("invalid_header", pack(json.dumps(VALID).encode("utf-16"))),
    ("invalid_header", pack(b"\xef\xbb\xbf" + json.dumps(VALID).encode())),
    ("invalid_header", pack(b"{" + b'"a":{' * 10_000 + b"}" * 10_001)),
    ("invalid_header", pack(b'{"a":' + b"[" * 60_000 + b"}")),
    ("invalid_header", pack(b'{"a":%b,"a":%b}' % (json.dumps(A).encode(), json.dumps(B).encode()))),
    ("invalid_header", pack(b'{"a":{"dtype":"F32","dtype":"F32","shape":[24],"data_offsets":[0,96]}}')),
    ("invalid_header", pack(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,96]}}')),
    ("invalid_header", pack({"a": None})),
    ("invalid_header", pack({"a": {"dtype": "F32", "shape": [24]}})),
    ("invalid_header", pack(one(extra=1))),
    ("invalid_header", metadata(None)),
    ("invalid_header", metadata(["x"])),
    ("invalid_header", metadata({"k": 1})),
    ("invalid_header", metadata({"k": None})),
    ("invalid_header", metadata({"k": {"n": "v"}})),
    ("invalid_header", metadata({"\ud800": ""})),
    ("invalid_header", metadata({"": "\udfff"})),
    ("too_many_tensors", pack({str(i): A for i in range(65)})),
    *(
        ("unsupported_dtype", pack(one(dtype=dtype)))
        for dtype in ("F64", "I64", "BOOL", "F8_E4M3", "F4", "C64", "f32", "", None, 1, ["F32"], {})
    ),
    *(
        ("invalid_shape", pack(one(shape=shape)))
        for shape in ([], [0, 24], [24, 0], [-4, -6], [4.0, 6], [True, 24], ["4", 6], [1] * 5, 24, None)
    ),
    ("invalid_shape", pack(one(shape=[24] + [1] * 1000))),
    ("invalid_shape", pack(b'{"a":{"dtype":"F32","shape":[24,-0],"data_offsets":[0,96]}}')),
    *(
        ("invalid_offsets", pack(one(data_offsets=offsets)))
        for offsets in (
            [0],
            [0, 96, 96],
            [-4, 92],
            [0.0, 96],
            [False, 96],
            [96, 0],
            [0, 92],
            [4, 100],
            None,
            "0,96",
        )
    ),
    ("invalid_offsets", pack(b'{"a":{"dtype":"F32","shape":[24],"data_offsets":[-0,96]}}')),
    ("invalid_offsets", pack(one(shape=[1 << 62, 4]))),
    ("invalid_offsets", pack({"a": A, "b": {**B, "data_offsets": [28, 92]}}, DATA[:-4])),
    ("invalid_offsets", pack({"a": A, "b": {**B, "data_offsets": [36, 100]}}, DATA + bytes(4))),
    ("invalid_offsets", pack({"a": A, "b": A}, DATA[:32])),
    ("not_safetensors", b"PK\x03\x04\x00\x00\x08\x08" + bytes(200)),
    ("not_safetensors", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(200)),
    ("not_safetensors", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94." + bytes(200)),
    ("not_safetensors", b"\x80\x02}q\x00."),
    ("not_safetensors", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + bytes(200)),
    ("not_safetensors", b"\x89HDF\r\n\x1a\n" + bytes(200)),
    ("not_safetensors", b"GGUF\x03\x00\x00\x00" + bytes(200)),
    ("not_safetensors", b"\x93NUMPY\x01\x00v\x00" + bytes(200)),
    ("not_safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 640\n"),
    ("not_safetensors", b"<!doctype html><title>Not found</title>"),
    ("not_safetensors", b'{"peft_type": "PROMPT_TUNING"}'),
]


@pytest.mark.parametrize(("code", "data"), BAD, ids=[f"{i}-{code}" for i, (code, _) in enumerate(BAD)])
def test_bad_files_are_refused_with_their_code(code: str, data: bytes) -> None:
    with pytest.raises(InvalidPromptFile) as caught:
        read(data)
    assert caught.value.code == code, caught.value.message
    assert (caught.value.status, caught.value.param) == (422, "adapter_model")
    assert len(caught.value.message) < 300 and caught.value.message.isascii()


def test_a_bin_file_is_told_how_to_become_safetensors() -> None:
    with pytest.raises(InvalidPromptFile, match="safe_serialization=True"):
        read(b"PK\x03\x04\x00\x00\x08\x08" + bytes(200))


def test_a_length_that_looks_like_a_pickle_is_no_pickle() -> None:
    text = json.dumps(VALID).encode().ljust(0x280)  # its length begins with the bytes 80 02
    assert read(pack(text)).tensors.keys() == {"a", "b"}


def test_a_length_that_looks_like_markup_is_no_page() -> None:
    text = json.dumps(VALID).encode().ljust(0x1003C)  # its length begins with "<", and is beyond our limit
    with pytest.raises(InvalidPromptFile) as caught:
        read(pack(text))
    assert caught.value.code == "header_too_large"


def agrees_with_the_library(data: bytes) -> bool:
    """False if the file is refused; if it is accepted, the library must accept it and find what we found."""
    try:
        header = read(data)
    except InvalidPromptFile:
        return False
    loaded = load(data)
    assert loaded.keys() == header.tensors.keys()
    for name, info in header.tensors.items():
        assert (tuple(loaded[name].shape), loaded[name].dtype) == (info.shape, DTYPES[info.dtype])
    return True


@given(
    tensors=st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.sampled_from(list(DTYPES.values()))),
        min_size=1,  # with none, and metadata, safetensors 0.8 writes a header that it cannot read itself
        max_size=4,
    ),
    metadata=st.none() | st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
)
@settings(max_examples=100, deadline=None, database=None)
def test_whatever_the_library_writes_within_limits_is_accepted(
    tensors: dict[str, tuple[list[int], torch.dtype]], metadata: dict[str, str] | None
) -> None:
    data = save({name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}, metadata)
    assert agrees_with_the_library(data)


# Edits that keep a header nearly valid reach deeper than random bytes do.
PIECES = [
    *'{}[]",:0123456789-+.eE\\u \n\t\x00',
    "true",
    "null",
    "NaN",
    "-0",
    "1e2",
    "96.0",
    "096",
    '"a"',
    '"F64"',
]
SEEDS = [
    json.dumps(VALID),
    json.dumps(one()),
    json.dumps(VALID, indent=1),
    json.dumps({"__metadata__": {}, **VALID}),
]
EDIT = st.tuples(st.integers(0, 200), st.integers(0, 6), st.sampled_from(PIECES) | st.text(max_size=2))


@given(seed=st.sampled_from(SEEDS), edits=st.lists(EDIT, max_size=3), data=st.sampled_from([DATA, DATA[:-4]]))
@settings(max_examples=300, deadline=None, database=None)
def test_edited_headers_never_pass_what_the_library_refuses(
    seed: str, edits: list[tuple[int, int, str]], data: bytes
) -> None:
    for position, removed, piece in edits:
        seed = seed[:position] + piece + seed[position + removed :]
    agrees_with_the_library(pack(seed.encode(), data))


@given(
    size=st.integers(0, 400),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    tail=st.binary(max_size=3),
)
@settings(max_examples=200, deadline=None, database=None)
def test_changed_bytes_raise_nothing_but_invalid_prompt_file(
    size: int, changes: list[tuple[int, int]], tail: bytes
) -> None:
    data = bytearray(pack(VALID)[:size] + tail)
    for position, value in changes:
        if position < len(data):
            data[position] = value
    agrees_with_the_library(bytes(data))
