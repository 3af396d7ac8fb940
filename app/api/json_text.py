"""JSON in which some parts are JSON text already, because they are too large to be made in the event loop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class JsonText:
    """A value in a reply."""

    text: str


def dump_json(value: Mapping[str, Any], *, ascii_only: bool = False) -> bytes:
    """As short as can be. Raises ValueError for NaN and infinities."""
    return "".join(_parts(value, ascii_only)).encode()


def _parts(value: Any, ascii_only: bool) -> Iterator[str]:
    if isinstance(value, JsonText):
        yield value.text
    elif isinstance(value, Mapping):
        for i, (key, item) in enumerate(value.items()):
            yield f"{',' if i else '{'}{json.dumps(key, ensure_ascii=ascii_only)}:"
            yield from _parts(item, ascii_only)
        yield "}" if value else "{}"
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield "," if i else "["
            yield from _parts(item, ascii_only)
        yield "]" if value else "[]"
    else:
        yield json.dumps(value, ensure_ascii=ascii_only, allow_nan=False, separators=(",", ":"))
