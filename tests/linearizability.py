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


# The registry as a sequential object: (live versions, aliases as (name, version, etag)), both frozen sets.
EMPTY = (frozenset[int](), frozenset[tuple[str, int, int]]())


def task_step(state: Any, operation: Operation) -> Hashable | None:
    """publish(alias) -> (version, etag), move(alias, version, expected) -> etag, delete(version) -> True,
    read() -> state.

    The result of what is refused is None.
    """
    versions, aliases = state
    named = {name: (version, etag) for name, version, etag in aliases}
    refused = operation.result is None
    match operation.name, operation.arguments:
        case "read", ():
            return state if operation.result == state else None
        case "publish", (alias,):
            version, etag = operation.result
            if version in versions:
                return None
            if alias is not None:
                named[alias] = (version, etag)
            versions = versions | {version}
        case "move", (alias, version, expected):
            possible = version in versions and (named[alias][1] if alias in named else None) == expected
            if refused or not possible:
                return state if refused and not possible else None
            named[alias] = (version, operation.result)
        case "delete", (version,):
            possible = version in versions and version not in {version for version, _ in named.values()}
            if refused or not possible:
                return state if refused and not possible else None
            versions = versions - {version}
    return versions, frozenset((name, *where) for name, where in named.items())
