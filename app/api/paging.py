"""Lists as OpenAI's clients page through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Query

from app.errors import InvalidRequest

Limit = Annotated[int, Query(ge=1, le=1_000)]
After = Annotated[str | None, Query(max_length=200, description="The last one of the page before")]


def after_number(after: str | None, what: str) -> int | None:
    """`after` of a list that is in the order of numbers, one of which need not be there any more."""
    if after is None:
        return None
    if not (after.isdecimal() and after.isascii() and len(after) < 10):
        raise InvalidRequest(f"after: must be the number of a {what}", param="after")
    return int(after)


def paged(rest: Sequence[Any], limit: int) -> dict[str, Any]:
    """The next `limit` of what is left."""
    return {"object": "list", "data": list(rest[:limit]), "has_more": len(rest) > limit}
