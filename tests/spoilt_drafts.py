"""Ways to spoil the parts of a safetensors file: header entries and tensor values."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

from tests.prompt_drafts import SIZES, Draft

NAMES = (
    *(
        "",
        " ",
        ".",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\windows\\win.ini",
        "\\\\host\\share",
        "a\x00b",
        "\x00",
    ),
    *(
        "prompt_embeddings ",
        "Prompt_Embeddings",
        "prompt_embeddings\x00",
        "prompt\u200b_embeddings",
        "рrompt_embeddings",
    ),
    *("base_model.model.lm_head.weight", "base_model.model.classifier.modules_to_save.default.weight", "lora_A.weight"),
    *("__metadata__", "__proto__", "constructor", "{{7*7}}", "${jndi:ldap://x}", "%s%n", "\u202e", "\U0001f600", "é"),
    *(
        "-rf",
        "CON",
        "'; DROP TABLE x;--",
        "<script>",
        "\r\nX: y",
        "\x1b[31m",
        "x" * 500,
        "prefix_task_cols",
        "prefix_task_rows",
    ),
)
# What fits in no field: types, sizes and spellings.
ODD: tuple[Any, ...] = (
    *(None, True, False, "", "1", "x" * 200, 0, -1, 1.0, 1.5, -0.0, 1e300, 2**31, 2**63, 2**64, 10**19, 10**30),
    *([], {}, [1], [[]], {"a": 1}, [None], "\x00", "\u202e", "NaN", "1e5", "é", "/etc/passwd", "file:///etc/passwd"),
)
DTYPES = (
    *(
        "F64",
        "I64",
        "I32",
        "I16",
        "I8",
        "U8",
        "U16",
        "U32",
        "U64",
        "BOOL",
        "F8_E4M3",
        "F8_E5M2",
        "F8_E8M0",
        "F4",
        "F6_E2M3",
    ),
    *("C64", "Q4_0", "f32", "float32", "F32 ", "F32\x00", "torch.float32"),
    *tuple(SIZES),
)
SHAPES: tuple[Any, ...] = (
    *([], [0], [0, 8], [8, 0], [0, 0], [1] * 5, [1] * 1000, [2**31], [2**62, 4], [2**63], [2**64, 1], [2**32, 2**32]),
    *(
        [3037000500, 3037000500],
        [10**19],
        [2**63, 2],
        [-1, -8],
        [-4, 8],
        [[4, 8]],
        ["4", "8"],
        [4.0, 8.0],
        [None],
        [True, 8],
    ),
    *(4, "4,8", {"0": 4}, None),
)
_EXTRA = (
    *(("F32", [2, 2], 16), ("F16", [4], 8), ("F32", [], 4), ("F32", [0, 3], 0), ("F32", [1] * 6, 4), ("F64", [1], 8)),
    *(("I64", [2], 16), ("BOOL", [3], 3), ("F8_E4M3", [2], 2), ("C64", [1], 8), ("U8", [5], 5), ("F4", [4], 2)),
)


def odd(rng: Random) -> Any:
    """A copy, which other changes may spoil further."""
    return deepcopy(rng.choice(ODD))


def _entry(rng: Random, draft: Draft) -> dict[str, Any]:
    entries = [entry for name in draft.names if isinstance(entry := draft.header[name], dict)]
    return rng.choice(entries) if entries else {}


def _dtype(rng: Random, draft: Draft) -> None:
    _entry(rng, draft)["dtype"] = rng.choice(DTYPES) if rng.random() < 0.8 else odd(rng)


def _shape(rng: Random, draft: Draft) -> None:
    entry = _entry(rng, draft)
    shape = entry.get("shape")
    if rng.random() < 0.5 or not isinstance(shape, list) or not shape or not all(type(item) is int for item in shape):
        entry["shape"] = deepcopy(rng.choice(SHAPES))
        return
    flat = [math.prod(shape)]
    entry["shape"] = rng.choice((shape[::-1], flat, [1, *shape], [*shape, 1], [shape[0] + 1, *shape[1:]], shape[:-1]))


def _shape_and_size(rng: Random, draft: Draft) -> None:
    """Consistent with its offsets and too large for the file, so that a reader may want to make room for it."""
    entry = _entry(rng, draft)
    shape = rng.choice(([2**20, 8], [2**40], [2**31, 2**20], [65_536, 65_536, 8], [2**62], [10**9, 8]))
    entry |= {"dtype": "F32", "shape": shape, "data_offsets": [0, math.prod(shape) * 4]}


def _offsets(rng: Random, draft: Draft) -> None:
    entry = _entry(rng, draft)
    offsets = entry.get("data_offsets")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(item) is int for item in offsets):
        return
    start, end = offsets
    by = rng.choice((1, 2, 4, 8, 32, 1 << 20, 1 << 62, 1 << 63, 1 << 64)) * rng.choice((1, -1))
    entry["data_offsets"] = rng.choice(
        (
            *(
                [end, start],
                [start + by, end + by],
                [start, end + by],
                [start - by, end],
                [start],
                [start, end, end],
                [],
            ),
            *(
                [float(start), end],
                [start, str(end)],
                [None, end],
                [False, end],
                [-end, -start],
                f"{start},{end}",
                None,
            ),
            *([2**64 - 1, 2**64 - 1 + end - start], [start - 2**64, end - 2**64], [start, start]),
        )
    )


def _overlap(rng: Random, draft: Draft) -> None:
    """Two tensors on the same bytes, or their ranges swapped."""
    if len(draft.names) < 2:
        draft.header["other"] = draft.header[draft.names[0]] if draft.names else {}
        return
    one, two = (draft.header[name] for name in rng.sample(draft.names, 2))
    if isinstance(one, dict) and isinstance(two, dict) and "data_offsets" in one and "data_offsets" in two:
        one["data_offsets"], two["data_offsets"] = rng.choice(
            ((two["data_offsets"], one["data_offsets"]), (one["data_offsets"], one["data_offsets"]))
        )


def _name(rng: Random, draft: Draft) -> None:
    if draft.names:
        old = rng.choice(draft.names)
        draft.header[rng.choice(NAMES)] = draft.header.pop(old)


def _extra_tensor(rng: Random, draft: Draft) -> None:
    """One that the type does not have; most of them are whole in themselves."""
    dtype, shape, size = rng.choice(_EXTRA)
    draft.add(rng.choice(NAMES), dtype, list(shape), bytes(size))


def _missing_tensor(rng: Random, draft: Draft) -> None:
    """The last one goes with its bytes, so that the rest is whole."""
    if draft.names:
        entry = draft.header.pop(draft.names[-1])
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if rng.random() < 0.8 and isinstance(offsets, list) and offsets and type(offsets[0]) is int:
            del draft.data[max(offsets[0], 0) :]


def _many_tensors(rng: Random, draft: Draft) -> None:
    for index in range(rng.choice((62, 65, 300, 2000))):
        draft.add(f"t{index}", "F16", [1], b"\x00\x3c")


def _entry_keys(rng: Random, draft: Draft) -> None:
    entry = _entry(rng, draft)
    if rng.random() < 0.5 and entry:
        entry.pop(rng.choice(list(entry)))
    else:
        entry[rng.choice(("Dtype", "strides", "requires_grad", "__proto__", "", "dtype "))] = odd(rng)


def _entry_kind(rng: Random, draft: Draft) -> None:
    if draft.names:
        draft.header[rng.choice(draft.names)] = odd(rng)


def _metadata(rng: Random, draft: Draft) -> None:
    value = odd(rng)
    draft.header["__metadata__"] = rng.choice(
        (value, {"k": value}, {rng.choice(NAMES): "v"}, {"k": "v" * 70_000}, {"k": {}})
    )


def _data(rng: Random, draft: Draft) -> None:
    if rng.random() < 0.5:
        draft.data += bytes(rng.choice((1, 2, 4, 8, 4096)))
    else:
        del draft.data[max(len(draft.data) - rng.choice((1, 2, 4, 8, 4096)), 0) :]


def _hole(rng: Random, draft: Draft) -> None:
    """Bytes of no tensor, before, between or behind them."""
    size, names = rng.choice((1, 4, 64)), draft.names
    position = rng.randint(0, len(names))
    for name in names[position:]:
        entry = draft.header[name]
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if isinstance(offsets, list) and all(type(item) is int for item in offsets):
            entry["data_offsets"] = [item + size for item in offsets]
    draft.data += bytes(size)


HEADERS: dict[str, Callable[[Random, Draft], None]] = {
    "dtype": _dtype,
    "shape": _shape,
    "shape and size": _shape_and_size,
    "offsets": _offsets,
    "overlap": _overlap,
    "hole": _hole,
    "name": _name,
    "extra tensor": _extra_tensor,
    "missing tensor": _missing_tensor,
    "many tensors": _many_tensors,
    "entry keys": _entry_keys,
    "entry kind": _entry_kind,
    "metadata": _metadata,
    "data": _data,
}

_BITS = {
    "F32": (
        0x7F800000,
        0xFF800000,
        0x7FC00000,
        0xFFC00000,
        0x7F800001,
        0x7FBFFFFF,
        1,
        0x807FFFFF,
        0x80000000,
        0x7F7FFFFF,
    )
    + tuple(
        struct.unpack("<I", struct.pack("<f", value))[0] for value in (1e38, -1e38, 1e6, 1.1e6, 65504, 65520, 1e20)
    ),
    "F16": (0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7C01, 0x0001, 0x83FF, 0x8000, 0x7BFF, 0xFBFF),
    "BF16": (0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0x0001, 0x807F, 0x7F7F, 0xFF7F, 0x7E96, 0x4975, 0x4780),
}


def _value(rng: Random, draft: Draft) -> None:
    """NaN, infinity, subnormal and huge numbers: one, or all of a tensor."""
    entry = _entry(rng, draft)
    dtype, offsets = entry.get("dtype"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in SIZES or not isinstance(offsets, list) or len(offsets) != 2:
        return
    if not all(type(item) is int and 0 <= item <= len(draft.data) for item in offsets) or offsets[0] >= offsets[1]:
        return
    size = SIZES[dtype]
    number = rng.choice(_BITS[dtype]).to_bytes(size, "little")
    count = (offsets[1] - offsets[0]) // size
    if rng.random() < 0.3:
        draft.data[offsets[0] : offsets[0] + count * size] = number * count
    elif count:
        place = offsets[0] + size * rng.randrange(count)
        draft.data[place : place + size] = number


def _noise(rng: Random, draft: Draft) -> None:
    """Random bits for numbers: mostly huge and tiny ones."""
    draft.data[:] = rng.randbytes(len(draft.data))


VALUES: dict[str, Callable[[Random, Draft], None]] = {"value": _value, "random bits": _noise}
