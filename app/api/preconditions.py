"""Entity tags and the two conditional headers (RFC 9110, sections 8.8.3 and 13.1)."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

from fastapi import Request

from app.errors import InvalidRequest, PreconditionRequired
from app.registry import ANY_ETAG

_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_LIST = re.compile(rf"{_TAG}(?:[ \t]*,[ \t]*{_TAG})*")
_NUMBER = re.compile(r'"([1-9][0-9]{0,17})"')


def _header(name: str, what: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": what, "schema": {"type": "string"}}


# For the OpenAPI document: one that is missing is 428, not a parameter that fails to validate.
IF_MATCH = _header("If-Match", "The ETag that is to be replaced, or `*`")
IF_NONE_MATCH = _header("If-None-Match", "`*`: only if there is none yet")
CACHED = _header("If-None-Match", "The ETag that the client has: 304 if it is the one")


def etag(value: object) -> str:
    """A strong entity tag."""
    return f'"{value}"'


def is_unchanged(request: Request, current: str) -> bool:
    """Whether If-None-Match names `current`, a strong tag: a GET is then answered with 304."""
    header = request.headers.get("if-none-match")
    if header is None:
        return False
    # The comparison is weak: proxies that compress turn a strong tag into a weak one.
    return header.strip() == "*" or current in (tag.removeprefix("W/") for tag in _tags(header))


def expected_etags(request: Request) -> Container[int] | None:
    """What a write may replace: the etags in If-Match, or None (nothing) for `If-None-Match: *`.

    The write itself compares, with what is there then. Raises PreconditionRequired without a header and InvalidRequest
    for a bad one.
    """
    match, none_match = request.headers.get("if-match"), request.headers.get("if-none-match")
    if match is None and none_match is None:
        raise PreconditionRequired("send If-Match with the etag to replace, or If-None-Match: * to create")
    if match is not None and none_match is not None:
        raise InvalidRequest("send either If-Match or If-None-Match")
    if match is None:
        if none_match != "*":
            raise InvalidRequest("If-None-Match must be *")
        return None
    if match.strip() == "*":
        return ANY_ETAG
    # The comparison is strong: a weak tag matches nothing, nor does one that we would not write.
    found = [_NUMBER.fullmatch(tag) for tag in _tags(match)]
    return frozenset(int(number[1]) for number in found if number)


def _tags(header: str) -> list[str]:
    if _LIST.fullmatch(header.strip(" \t")) is None:
        raise InvalidRequest("the header must be * or a list of quoted entity tags")
    return re.findall(_TAG, header)
