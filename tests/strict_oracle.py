"""Whether a text is JSON that every reader understands alike: written without a look at app.strict_json."""

from __future__ import annotations

import json
import re
from typing import Any

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


def complaint(text: bytes) -> str | None:
    """What is wrong, or None."""
    bare = _STRING.sub(b"", text)
    if not text.strip(b" \t\r\n").startswith(b"{"):
        return "no object"
    if not all(_NUMBER.fullmatch(word) for word in re.findall(rb"[-+.0-9A-Za-z_]+", bare) if word not in _WORDS):
        return "a word or number that is none"
    if any(len(word) > 20 for word in re.findall(rb"(?<![.0-9eE])[0-9]+(?![.0-9eE])", bare)):
        return "a long integer"
    if any(float(word) in (float("inf"), float("-inf")) for word in _NUMBER.findall(bare)):
        return "a number beyond float64"
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice.extend(key for key in set(keys) if keys.count(key) > 1)
        return dict(pairs)

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        return str(error)
    if twice:
        return "a key that occurs twice"
    return "too deep" if deepest(bare) > 33 else None


def deepest(bare: bytes) -> int:
    depth = most = 0
    for byte in bare:
        depth += (byte in b"[{") - (byte in b"]}")
        most = max(most, depth)
    return most


_WORDS = (b"true", b"false", b"null")
