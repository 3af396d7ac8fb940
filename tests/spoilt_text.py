"""Ways to spoil the text of a JSON object. Some leave it the same to a lenient reader, a few to a strict one too."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random

from tests.prompt_drafts import pack_json

PIECES = (
    *'{}[]",:0123456789-+.eE\\u \n\t\r\x00\x7f',
    *("true", "null", "NaN", "-Infinity", "-0", "1e2", "96.0", "096", "1e999", "9" * 25, "/*", "//", "\ufeff"),
    *('"a"', '"F64"', '"dtype":', '"__metadata__":', "\\ud800", "\\u0000", "\u202e", "\U0001f600", "é"),
)
NUMBERS = (
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1e400", b"-0", b"-0.0", b"1.0", b"1e0", b"0x10"),
    *(b"01", b"+1", b".5", b"1.", b"1e", b"--1", b"-1", b"true", b'"1"', b"null", b"[]", b"{}", b"1_000", b"\xd9\xa1"),
    *(b"9" * 20, b"9" * 21, b"7" * 5000, b"1" + b"0" * 60_000, b"18446744073709551616", b"9223372036854775808"),
)
DEPTHS = (10, 31, 32, 33, 200, 2_000, 20_000)


def _edit(rng: Random, text: bytes) -> bytes:
    """A piece in, some bytes out, anywhere, up to three times."""
    for _ in range(rng.randint(1, 3)):
        position = rng.randint(0, len(text))
        text = text[:position] + rng.choice(PIECES).encode() + text[position + rng.randint(0, 6) :]
    return text


def _cut(rng: Random, text: bytes) -> bytes:
    return text[: rng.randint(0, max(len(text) - 1, 0))]


def _number(rng: Random, text: bytes) -> bytes:
    found = list(re.finditer(rb"(?<=[\[,:])-?\d+(?=[,\]}])", text))
    if not found:
        return text
    place = rng.choice(found)
    return text[: place.start()] + rng.choice(NUMBERS) + text[place.end() :]


def _duplicate(rng: Random, text: bytes) -> bytes:
    """A key of the object, or of one inside it, twice: with the same value, or with one of another kind."""
    found = list(re.finditer(rb'("[^"]*"):(\d+|"[^"]*"|null|\[[^\]]*\]|\{[^{}]*\})', text))
    if not found:
        return text
    place = rng.choice(found)
    value = rng.choice((place.group(2), b"1", b'"x"', b"null", b"{}"))
    again = place.group(1) if rng.random() < 0.7 else b'"\\u%04x' % place.group(1)[1] + place.group(1)[2:]
    return text[: place.end()] + b"," + again + b":" + value + text[place.end() :]


def _deep(rng: Random, text: bytes) -> bytes:
    depth = rng.choice(DEPTHS)
    opened, closed = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    inner = opened * depth + b"1" + (closed * depth if rng.random() < 0.7 else b"")
    return b'{"deep":' + inner + b"," + text[1:]


def _encoding(rng: Random, text: bytes) -> bytes:
    readable = text.decode("utf-8", "replace")
    return rng.choice(
        (
            b"\xef\xbb\xbf" + text,
            readable.encode("utf-16"),
            readable.encode("utf-16-le"),
            readable.encode("utf-32"),
            text.replace(b'"', b'"\xff', 1),
            text.replace(b'"', b'"\xc0\xaf', 1),
            text.replace(b'"', b'"\xed\xa0\x80', 1),
            text.replace(b'"', b'"\xf4\x90\x80\x80', 1),
            text.replace(b'"', b'"\x00', 1),
            text.replace(b'"', b'"\xe2\x80\xae', 1),
        )
    )


def _surrogate(rng: Random, text: bytes) -> bytes:
    bad = rng.choice(
        (b"\\ud800", b"\\udfff", b"\\ud83d\\u0041", b"\\ud83d\\ude00", b"\\uD800\\uD800", b"\\u12", b"\\x41")
    )
    front = rng.choice((b'{"k":"%s",' % bad, b'{"k%s":"v",' % bad, b'{"k":["%s"],' % bad))
    return text.replace(b'"', b'"' + bad, 1) if rng.random() < 0.5 else front + text[1:]


def _around(rng: Random, text: bytes) -> bytes:
    before = (b" ", b"\n", b"\t", b"\x00", b"[", b"\xc2\xa0", b"while(1);", b"{}")
    after = (
        b" ",
        b" " * 5000,
        b"\n",
        b"\x00",
        b"\x00" * 8,
        b"{}",
        b"]",
        b",",
        b"  x",
        b"\xc2\xa0",
        b"<!-- -->",
        b"PK\x03\x04",
    )
    return rng.choice(before) + text if rng.random() < 0.4 else text + rng.choice(after)


def _same(rng: Random, text: bytes) -> bytes:
    """Another spelling of the same value."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    spelt = json.dumps(value, indent=rng.choice((0, 1, 4))).encode() if rng.random() < 0.5 else text
    return re.sub(rb'"([a-z])', lambda found: b'"\\u%04x' % ord(found[1]), spelt, count=rng.randint(0, 4))


def _padding(rng: Random, text: bytes) -> bytes:
    """Large, for a reader without a limit."""
    size = rng.choice((1_000, 60_000, 70_000, 300_000))
    filler = rng.choice(
        (b'{"fill":"%s",' % (b"x" * size), b'{"fill":[%s0],' % (b"0," * (size // 2)), b"{" + b" " * size)
    )
    return filler + text[1:]


def _kind(rng: Random, text: bytes) -> bytes:
    """Not an object at all."""
    return rng.choice(
        (
            b"",
            b"[]",
            b"[%s]" % text,
            b"null",
            b"1",
            b'"x"',
            b"{}",
            b"{",
            b"}",
            b"{}" + text,
            pack_json(text.decode("latin-1")),
        )
    )


def _syntax(rng: Random, text: bytes) -> bytes:
    return rng.choice(
        (
            text.replace(b'"', b"'"),
            text[:-1] + b",}",
            text[:-1] + b"/* */}",
            text[:-1] + b"#\n}",
            text.replace(b":", b"=", 1),
            text.replace(b",", b";", 1),
            text.replace(b'"', b"", 2),
            b"{" + b'"__proto__":{"polluted":1},' + text[1:],
        )
    )


TEXTS: dict[str, Callable[[Random, bytes], bytes]] = {
    "edit": _edit,
    "cut": _cut,
    "number": _number,
    "duplicate": _duplicate,
    "deep": _deep,
    "encoding": _encoding,
    "surrogate": _surrogate,
    "around": _around,
    "same": _same,
    "padding": _padding,
    "kind": _kind,
    "syntax": _syntax,
}
