"""JSON (RFC 8259) from strangers: what two readers could understand differently is refused."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 32
MAX_INTEGER_DIGITS = 20  # every 64-bit integer fits; converting a longer one costs quadratic time


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse UTF-8 bytes holding one JSON object.

    Raises ValueError, whose message repeats at most 60 characters of the input, for anything else: another
    encoding, a byte order mark, duplicate keys, NaN and Infinity, numbers beyond float64, integers of more
    than 20 digits, lone surrogates, nesting deeper than 32.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    _check(value, MAX_DEPTH)
    return value


def shorten(value: object, limit: int = 60) -> str:
    """The value in printable ASCII, for a message."""
    text = ascii(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shorten(key)} occurs twice")
        found[key] = value
    return found


def _integer(text: str) -> int | float:
    if len(text.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise ValueError(f"an integer has {len(text)} digits but may have {MAX_INTEGER_DIGITS}")
    # NOTE: minus zero is no integer to serde (the parser inside safetensors) nor to JavaScript.
    return -0.0 if text == "-0" else int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shorten(text)} does not fit into 64 bits")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check(value: Any, depth: int) -> None:
    if isinstance(value, str):
        # A lone surrogate (written as an escape) cannot be encoded again, by a tokenizer least of all.
        value.encode("utf-8")
    elif isinstance(value, (dict, list)):
        if depth == 0:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            for key in value:
                key.encode("utf-8")
        for item in value.values() if isinstance(value, dict) else value:
            _check(item, depth - 1)
