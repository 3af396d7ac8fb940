"""What callers may ask of a task, as functions of its state: each returns the change to log, or raises.

They are called again whenever another process was faster, so they decide by the state they are given alone.
`expected` is the etag under which the caller saw an alias, or several of which it has one; None says that there must
be none yet.
"""

from __future__ import annotations

from collections.abc import Container
from datetime import datetime

from app.errors import PreconditionFailed
from app.registry.alias import Alias, Target
from app.registry.log import (
    CollectVersion,
    DeleteTask,
    DeleteVersion,
    MoveAlias,
    RemoveAlias,
    RestoreVersion,
    RollBackAlias,
    SplitAlias,
)
from app.registry.reference import DEFAULT_ALIAS, not_found
from app.registry.task import DeletedVersion, TaskState

Etags = int | Container[int]


class _Any:
    def __contains__(self, etag: object) -> bool:
        return True


ANY_ETAG: Container[int] = _Any()  # whatever the alias stands for, as long as there is one


def move_alias(state: TaskState, name: str, target: Target, expected: Etags | None) -> MoveAlias | SplitAlias:
    if not target.numbers <= state.task.versions.keys():
        raise not_found()
    _check(state.task.aliases.get(name), expected)
    if target.is_split:
        return SplitAlias(alias=name, weights=list(target.weights))
    return MoveAlias(alias=name, version=target.version)


def roll_back_alias(state: TaskState, name: str, expected: Etags) -> RollBackAlias:
    alias = _existing(state, name, expected)
    if not alias.previous:
        raise PreconditionFailed("the alias has not been anything else")
    target = alias.previous[0]
    for number in sorted(target.numbers - state.task.versions.keys()):
        how = "restore it first" if number in state.deleted else "its files are gone"
        raise PreconditionFailed(f"version {number}, which the alias was before, is deleted: {how}")
    return RollBackAlias(alias=name, weights=list(target.weights))


def remove_alias(state: TaskState, name: str, expected: Etags) -> RemoveAlias:
    _existing(state, name, expected)
    return RemoveAlias(alias=name)


def delete_version(state: TaskState, number: int) -> DeleteVersion:
    if number not in state.task.versions:
        raise not_found()
    names = [alias.name for alias in state.task.aliases.values() if number in alias.target.numbers]
    if names:
        raise PreconditionFailed(f"{state.task.name}:{number} is named by the alias {', '.join(names)}")
    return DeleteVersion(version=number)


def restore_version(state: TaskState, number: int) -> RestoreVersion:
    if number not in state.deleted:
        raise not_found()
    return RestoreVersion(version=number)


def delete_task(state: TaskState) -> DeleteTask:
    """`latest` goes with it: publishing moves that unasked. Others were set by someone who needs them."""
    if not state.task.versions:
        raise not_found()
    names = [name for name in state.task.aliases if name != DEFAULT_ALIAS]
    if names:
        raise PreconditionFailed(f"the task has the alias {', '.join(names)}")
    return DeleteTask()


def collect_version(state: TaskState, number: int, deleted_before: datetime) -> CollectVersion | None:
    """None if it has been restored or collected meanwhile."""
    deleted = state.deleted.get(number)
    return CollectVersion(version=number) if deleted and is_due(deleted, deleted_before) else None


def is_due(deleted: DeletedVersion, deleted_before: datetime) -> bool:
    return datetime.fromisoformat(deleted.deleted_at) < deleted_before


def _existing(state: TaskState, name: str, expected: Etags) -> Alias:
    alias = state.task.aliases.get(name)
    if alias is None:
        raise not_found()
    _check(alias, expected)
    return alias


def _check(alias: Alias | None, expected: Etags | None) -> None:
    if expected is None:
        if alias is not None:
            raise PreconditionFailed("the alias exists already")
    elif alias is None:
        raise PreconditionFailed("the alias is gone")
    elif alias.etag not in ((expected,) if isinstance(expected, int) else expected):
        raise PreconditionFailed("the alias was moved since")
