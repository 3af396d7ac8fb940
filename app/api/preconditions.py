"""Entity tags and the two conditional headers (RFC 9110, sections 8.8.3 and 13.1)."""

from __future__ import annotations

import re

from fastapi import Request

from app.errors import InvalidRequest, PreconditionFailed, PreconditionRequired

_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_LIST = re.compile(rf"{_TAG}(?:[ \t]*,[ \t]*{_TAG})*")


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


def expected_etag(request: Request, current: int | None) -> int | None:
    """What a write may replace: the etag in If-Match, or None (nothing) for `If-None-Match: *`.

    `current` is the etag as it stands, None if there is nothing yet; the write itself must compare again.
    Raises PreconditionRequired without a header, PreconditionFailed for a stale one, InvalidRequest for a bad one.
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
    # The comparison is strong: a weak tag matches nothing.
    if current is None or (match.strip() != "*" and etag(current) not in _tags(match)):
        raise PreconditionFailed("If-Match names no current etag")
    return current


def _tags(header: str) -> list[str]:
    if _LIST.fullmatch(header.strip(" \t")) is None:
        raise InvalidRequest("the header must be * or a list of quoted entity tags")
    return re.findall(_TAG, header)
