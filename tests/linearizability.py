"""Whether a history of overlapping operations could have happened one after the other (Wing and Gong, 1993).

A history is linearizable if each operation can be given a moment between its call and its return so that a
sequential object, going through them in that order, gives every result that was seen. The search remembers which
sets of operations led to which state (Lowe, 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from app.registry.task import MAX_STEPS_BACK


@dataclass(frozen=True)
class Operation:
    call: int  # nanoseconds of one clock
    end: float  # math.inf: it was cut off, and may have happened or not
    name: str
    arguments: tuple[Any, ...]
    result: Any


class _Event:
    """A call or a return in a list that is doubly linked, so that an operation is lifted out of it and back."""

    def __init__(self, number: int, returns: _Event | None) -> None:
        self.number = number
        self.returns = returns  # of a call: its return
        self.before: _Event = self
        self.after: _Event | None = None


def linearizable(
    history: Iterable[Operation], initial: Hashable, step: Callable[[Any, Operation], Hashable | None]
) -> bool:
    """`step` gives the state after an operation, or None if it cannot have had its result in this state."""
    operations = sorted(history, key=lambda operation: operation.call)
    head = _events(operations)
    needed = sum(1 << i for i, operation in enumerate(operations) if operation.end < math.inf)
    state, done = initial, 0
    seen = {(done, state)}
    taken: list[tuple[_Event, Any]] = []  # with the state before each
    event = head.after
    while done & needed != needed:
        assert event is not None
        if event.returns is not None:
            after = step(state, operations[event.number])
            configuration = (done | 1 << event.number, after)
            if after is not None and configuration not in seen:
                seen.add(configuration)
                taken.append((event, state))
                state, done = after, configuration[0]
                _lift(event)
                event = head.after
                continue
            event = event.after
        else:
            # This operation has returned and was not taken: something before it was wrong.
            if not taken:
                return False
            event, state = taken.pop()
            done &= ~(1 << event.number)
            _unlift(event)
            event = event.after
    return True


def _events(operations: list[Operation]) -> _Event:
    moments: list[tuple[float, int, _Event]] = []
    for number, operation in enumerate(operations):
        end = _Event(number, None)
        moments += [(operation.call, 0, _Event(number, end)), (operation.end, 1, end)]
    # At the same moment calls come first: then the two overlap, which forbids less.
    moments.sort(key=lambda moment: moment[:2])
    head = last = _Event(-1, None)
    for _, _, event in moments:
        last.after, event.before = event, last
        last = event
    return head


def _lift(event: _Event) -> None:
    for one in (event, event.returns):
        assert one is not None
        one.before.after = one.after
        if one.after is not None:
            one.after.before = one.before


def _unlift(event: _Event) -> None:
    for one in (event.returns, event):
        assert one is not None
        one.before.after = one
        if one.after is not None:
            one.after.before = one


# The registry as a sequential object: (live versions, aliases as (name, versions, etag), deleted versions, what each
# alias was as (name, tuple of its versions, the last first)), all frozen sets. A read shows the first three.
EMPTY = (
    frozenset[int](),
    frozenset[tuple[str, tuple[int, ...], int]](),
    frozenset[int](),
    frozenset[tuple[str, tuple[tuple[int, ...], ...]]](),
)


def task_step(state: Any, operation: Operation) -> Hashable | None:
    """publish(alias) -> (version, etag), move and split(alias, versions, expected) -> etag,
    roll_back(alias, expected) -> etag, delete, restore and collect(version) -> True, read() -> state.

    The result of what is refused is None.
    """
    versions, aliases, deleted, pasts = state
    named = {name: (target, etag) for name, target, etag in aliases}
    past = dict(pasts)
    refused = operation.result is None
    if operation.name in ("publish", "move", "split", "roll_back") and not refused and operation.arguments[0]:
        # Etags only grow. Without that, what an alias was would differ by the order of publications that overlap, and
        # there would be more states than can be searched.
        etag = operation.result[1] if operation.name == "publish" else operation.result
        if etag <= named.get(operation.arguments[0], ((), 0))[1]:
            return None

    def point(alias: str, target: tuple[int, ...], etag: int) -> None:
        if alias in named and named[alias][0] != target:
            past[alias] = (named[alias][0], *past.get(alias, ()))[:MAX_STEPS_BACK]
        named[alias] = (target, etag)

    match operation.name, operation.arguments:
        case "read", ():
            return state if operation.result == state[:3] else None
        case "publish", (alias,):
            version, etag = operation.result
            if version in versions or version in deleted:
                return None
            if alias is not None:
                point(alias, (version,), etag)
            versions = versions | {version}
        case "move" | "split", (alias, target, expected):
            possible = versions.issuperset(target) and (named[alias][1] if alias in named else None) == expected
            if refused or not possible:
                return state if refused and not possible else None
            point(alias, tuple(target), operation.result)
        case "roll_back", (alias, expected):
            back = past.get(alias, ())
            possible = alias in named and named[alias][1] == expected and back and versions.issuperset(back[0])
            if refused or not possible:
                return state if refused and not possible else None
            named[alias], past[alias] = (back[0], operation.result), back[1:]
        case "delete", (version,):
            possible = version in versions and not any(version in target for target, _ in named.values())
            if refused or not possible:
                return state if refused and not possible else None
            versions, deleted = versions - {version}, deleted | {version}
        case "restore", (version,):
            if refused or version not in deleted:
                return state if refused and version not in deleted else None
            versions, deleted = versions | {version}, deleted - {version}
        case "collect", (version,):
            # Two that are at it at once may both say so.
            if version in versions:
                return None
            deleted = deleted - {version}
    return (
        versions,
        frozenset((name, *where) for name, where in named.items()),
        deleted,
        frozenset(past.items()),
    )
