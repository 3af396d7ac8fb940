"""The strict header reader against the library, on spoilt files: what we accept means the same to both."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from app.errors import InvalidPromptFile
from app.safetensors_header import SafetensorsHeader, read_header
from app.strict_json import MAX_DEPTH
from tests.long_run import SECONDS, SEED, indices, long_count, report
from tests.prompt_drafts import SIZES
from tests.prompt_fuzzer import case

MAX_HEADER, MAX_TENSORS, MAX_RANK = 64 << 10, 64, 4
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Keeps the last of two keys, as most readers do, and counts what got lost."""
    found = dict(items)
    if len(found) < len(items):
        found["twice"] = True
    return found


def depth(value: Any) -> int:
    if not isinstance(value, (dict, list)):
        return 0
    return 1 + max((depth(item) for item in (value.values() if isinstance(value, dict) else value)), default=0)


def why_strict(file: bytes, code: str | None) -> str | None:
    """The listed reason for which a file that the library takes may be refused: found without our own reader."""
    length = int.from_bytes(file[:8], "little")
    if code == "header_too_large":
        return "header beyond our limit" if length > MAX_HEADER else None
    header = json.loads(file[8 : 8 + length], object_pairs_hook=pairs)
    entries = {name: entry for name, entry in header.items() if name not in ("__metadata__", "twice")}
    if code == "too_many_tensors":
        return "tensors beyond our limit" if len(entries) > MAX_TENSORS else None
    if code == "unsupported_dtype":
        found = any(entry["dtype"] not in SIZES for entry in entries.values())
        return "dtype that no prompt has" if found else None
    if code == "invalid_shape":
        ranks = [entry["shape"] for entry in entries.values()]
        found = any(not 1 <= len(shape) <= MAX_RANK or 0 in shape for shape in ranks)
        return "rank or empty dimension that no prompt has" if found else None
    text = file[8 : 8 + length].rstrip(b" ")
    if code in ("invalid_header", "not_safetensors") and (text[:1] != b"{" or text[-1:] != b"}"):
        return "white space that is no padding"
    if code != "invalid_header":
        return None  # offsets, sizes and the format itself: both say the same, always
    if header.get("twice") or any("twice" in entry for entry in header.values() if isinstance(entry, dict)):
        return "key that occurs twice"
    if any(entry.keys() - {"dtype", "shape", "data_offsets"} for entry in entries.values()):
        return "key that means nothing"
    if header.get("__metadata__", {}) is None:
        return "metadata of null"
    if depth(header) > MAX_DEPTH:
        return "nested deeper than we read"
    return None


def both(file: bytes) -> str:
    """What the two readers make of a file; an assertion fails where they differ without a listed reason."""
    header = code = None
    try:
        header = read_header(file, max_header_bytes=MAX_HEADER, max_tensors=MAX_TENSORS)
    except InvalidPromptFile as error:
        code = error.code
    try:
        loaded = load(file)
    except SafetensorError:
        assert header is None, "we accept what the library refuses"
        return "both refuse"
    except Exception as error:  # torch's, of dtypes that it has no name for
        assert header is None, repr(error)
        return "both refuse"
    if header is None:
        reason = why_strict(file, code)
        assert reason is not None, f"the library accepts it; we refuse it with {code}"
        return reason
    check_equal(file, header, loaded)
    return "both accept"


def check_equal(file: bytes, header: SafetensorsHeader, loaded: dict[str, torch.Tensor]) -> None:
    """Names, dtypes, shapes and every bit of the numbers, which are read here from the JSON's own offsets."""
    length = int.from_bytes(file[:8], "little")
    entries, data = json.loads(file[8 : 8 + length]), file[8 + length :]
    assert entries.pop("__metadata__", {}) == header.metadata
    assert loaded.keys() == header.tensors.keys() == entries.keys()
    assert length <= MAX_HEADER and len(entries) <= MAX_TENSORS, "our own limits"
    for name, info in header.tensors.items():
        tensor = loaded[name]
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, DTYPES[info.dtype])
        assert 1 <= len(info.shape) <= MAX_RANK and 0 not in info.shape, "our own limits"
        words = np.frombuffer(data[slice(*entries[name]["data_offsets"])], f"<u{SIZES[info.dtype]}")
        kind = torch.int32 if SIZES[info.dtype] == 4 else torch.int16
        found = tensor.view(kind).numpy().view(f"<u{SIZES[info.dtype]}")
        assert (found == words.reshape(info.shape)).all()


def run(seed: int, count: int, seconds: float = float("inf")) -> Counter[str]:
    found: Counter[str] = Counter()
    for index in indices(count, seconds):
        try:
            found[both(case(seed, index).tensors)] += 1
        except Exception as error:
            raise AssertionError(f"case({seed}, {index}): {error!r}"[:2_000]) from error
    return found


def test_spoilt_files() -> None:
    found = run(SEED, 5_000)
    assert found["both accept"] > 500 and found["both refuse"] > 500
    assert len(found) >= 8, found


@pytest.mark.long
@pytest.mark.timeout(0)
def test_a_million_spoilt_files(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(SEED, long_count(1_000_000), SECONDS)
    with capsys.disabled():
        report(f"seed {SEED}, {found.total()} files: {found.most_common()}")
    assert found["both accept"] > found.total() // 10


def test_every_changed_byte_of_a_small_header() -> None:
    """All 256 values at every place of a file whose header has everything."""
    text = b'{"__metadata__":{"k":"v"},"a":{"dtype":"F16","shape":[1,2],"data_offsets":[0,4]}}'
    file = len(text).to_bytes(8, "little") + text + b"\x00\x3c\x00\x40"
    found: Counter[str] = Counter()
    for place in range(len(file)):
        for value in range(256):
            found[both(file[:place] + bytes([value]) + file[place + 1 :])] += 1
    assert found["both accept"] > 1_000
