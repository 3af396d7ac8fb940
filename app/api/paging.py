"""Lists as OpenAI's clients page through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Query

Limit = Annotated[int, Query(ge=1, le=1_000)]
After = Annotated[str | None, Query(max_length=200, description="The last one of the page before")]


def paged(rest: Sequence[Any], limit: int) -> dict[str, Any]:
    """The next `limit` of what is left."""
    return {"object": "list", "data": list(rest[:limit]), "has_more": len(rest) > limit}
