"""What the methods on aliases send and how they read the reply; as `calls`."""

from __future__ import annotations

from collections.abc import Mapping

import httpx

from app.client.call import Call, etag_of, given, path, reading
from app.client.results import Alias, Deleted


def alias(task: str, name: str) -> Call[Alias]:
    """What an alias stands for, and the etag with which it can be moved."""
    return Call("GET", _alias_path(task, name), _read_alias)


def set_alias(
    task: str, name: str, *, version: int | None = None, weights: Mapping[int, float] | None = None, etag: str | None
) -> Call[Alias]:
    """Point an alias at a version, or split it among several by weight. `etag`: of what is replaced; None: nothing is.

    Raises Conflict if somebody else was first.
    """
    shares = None if weights is None else {str(number): share for number, share in weights.items()}
    return Call(
        "PUT",
        _alias_path(task, name),
        _read_alias,
        headers={"If-None-Match": "*"} if etag is None else {"If-Match": etag},
        json=given(version=version, weights=shares),
        repeatable=False,  # the move that was done is in the way of itself
    )


def remove_alias(task: str, name: str, *, etag: str) -> Call[Deleted]:
    """Remove an alias; the versions that it names stay."""
    headers = {"If-Match": etag}
    return Call("DELETE", _alias_path(task, name), reading(Deleted), headers=headers, repeatable=False)


def roll_back(task: str, name: str, *, etag: str) -> Call[Alias]:
    """Undo an alias's last move; again, the one before it."""
    path = _alias_path(task, name) + ":rollback"
    return Call("POST", path, _read_alias, headers={"If-Match": etag}, repeatable=False)


def _alias_path(task: str, name: str) -> str:
    return path("v1", "tasks", task, "aliases", name)


def _read_alias(response: httpx.Response) -> Alias:
    return reading(Alias)(response).model_copy(update={"etag": etag_of(response)})
