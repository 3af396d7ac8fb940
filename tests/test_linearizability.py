"""The checker itself: it accepts what can be put in order, and refuses planted violations."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from tests.linearizability import EMPTY, Operation, linearizable, task_step


def op(call: int, end: float, name: str, *arguments: object, result: object = None) -> Operation:
    return Operation(call, end, name, arguments, result)


def state(versions: set[int], *aliases: tuple[str, int, int], deleted: tuple[int, ...] = ()) -> object:
    """As a read shows it."""
    return frozenset(versions), frozenset((name, (at,), etag) for name, at, etag in aliases), frozenset(deleted)


PUBLISHED = [op(0, 1, "publish", "a", result=(1, 1)), op(2, 3, "publish", None, result=(2, None))]
ONE = state({1, 2}, ("a", 1, 1))
TWO = state({1, 2}, ("a", 2, 3))
BACK = state({1, 2}, ("a", 1, 4))
MOVED = op(4, 5, "move", "a", [2], 1, result=3)
DELETED = op(4, 5, "delete", 2, result=True)
READ_BACK = op(8, 9, "read", result=BACK)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], True),
        ([op(4, 5, "read", result=ONE)], True),
        ([op(4, 5, "read", result=state(set()))], False),  # stale
        ([op(0, 5, "read", result=state(set()))], True),  # overlaps
        ([op(4, 8, "move", "a", [2], 1, result=3), op(5, 6, "read", result=ONE), op(6, 7, "read", result=TWO)], True),
        ([op(4, 8, "move", "a", [2], 1, result=3), op(5, 6, "read", result=TWO), op(7, 7, "read", result=ONE)], False),
        ([op(4, 5, "move", "a", [2], 1, result=3), op(6, 7, "read", result=ONE)], False),  # lost
        ([op(4, 6, "move", "a", [2], 1, result=3), op(5, 7, "move", "a", [2], 1, result=4)], False),  # both won
        ([op(4, 6, "move", "a", [2], 1, result=3), op(5, 7, "move", "a", [2], 1)], True),
        ([op(4, 6, "move", "a", [2], 1), op(5, 7, "move", "a", [2], 1)], False),  # neither won
        ([op(4, 5, "move", "b", [2], None, result=3), op(4, 5, "move", "b", [1], None)], True),
        ([op(4, 5, "delete", 1, result=True)], False),  # an alias names it
        ([op(4, 5, "delete", 2, result=True), op(4, 6, "move", "a", [2], 1)], True),
        ([op(4, 5, "delete", 2, result=True), op(6, 7, "move", "a", [2], 1, result=3)], False),  # to one deleted
        ([op(4, 5, "publish", None, result=(2, None))], False),  # a number twice
        ([MOVED, op(6, 7, "roll_back", "a", 3, result=4), op(8, 9, "read", result=BACK)], True),
        ([MOVED, op(6, 7, "roll_back", "a", 3, result=4), op(8, 9, "read", result=TWO)], False),  # lost
        ([MOVED, op(6, 8, "roll_back", "a", 3, result=4), op(6, 8, "roll_back", "a", 3, result=5)], False),  # both won
        ([MOVED, op(6, 7, "delete", 1, result=True), op(8, 9, "roll_back", "a", 3, result=4)], False),  # to one deleted
        ([MOVED, op(6, 7, "roll_back", "a", 3)], False),  # refused for nothing
        ([op(4, 5, "roll_back", "a", 1)], True),  # it was nothing else
        ([op(4, 5, "roll_back", "a", 1, result=3)], False),
        ([op(4, 5, "split", "a", [1, 2], 1, result=3), op(6, 7, "delete", 2, result=True)], False),
        ([op(4, 5, "split", "a", [1, 2], 1, result=3), op(6, 7, "roll_back", "a", 3, result=4), READ_BACK], True),
        ([DELETED, op(6, 7, "read", result=state({1}, ("a", 1, 1), deleted=(2,)))], True),
        ([DELETED, op(6, 7, "restore", 2, result=True), op(8, 9, "read", result=ONE)], True),
        ([DELETED, op(6, 7, "restore", 2)], False),
        ([DELETED, op(6, 7, "collect", 2, result=True), op(8, 9, "restore", 2)], True),
        ([DELETED, op(6, 7, "collect", 2, result=True), op(8, 9, "restore", 2, result=True)], False),  # without files
        ([DELETED, op(6, 8, "collect", 2, result=True), op(6, 8, "restore", 2, result=True)], False),
        ([DELETED, op(6, 7, "publish", None, result=(2, None))], False),
        ([op(4, 5, "collect", 2, result=True)], False),  # a live one
        ([op(4, math.inf, "move", "a", [2], 1, result=3), op(6, 7, "read", result=ONE)], True),
        ([op(4, math.inf, "move", "a", [2], 1, result=3), op(6, 7, "read", result=TWO)], True),
        (
            [
                op(4, math.inf, "move", "a", [2], 1, result=3),
                op(6, 7, "read", result=TWO),
                op(8, 9, "read", result=ONE),
            ],
            False,
        ),
    ],
)
def test_known_histories(history: list[Operation], expected: bool) -> None:
    assert linearizable([*PUBLISHED, *history], EMPTY, task_step) is expected


def by_definition(history: list[Operation]) -> bool:
    """Try every order."""
    for order in itertools.permutations(history):
        if any(b.end < a.call for i, a in enumerate(order) for b in order[i + 1 :]):
            continue
        current: object = EMPTY
        for operation in order:
            current = task_step(current, operation)
            if current is None:
                break
        else:
            return True
    return False


def random_history(choose: random.Random, length: int, width: int) -> list[Operation]:
    """What a correct registry may answer: each operation happens at once, and is seen for a while around that."""
    versions: set[int] = set()
    aliases: dict[str, tuple[int, int]] = {}
    deleted: list[int] = []
    history = []
    for seq in range(1, length + 1):
        kind, alias, version = choose.choice(("publish", "move", "delete", "read")), "a", choose.randint(1, 4)
        arguments: tuple[object, ...] = ()
        result: object = None
        if kind == "publish":
            arguments, result = (alias,), (seq + 10, seq)
            versions.add(seq + 10)
            aliases[alias] = (seq + 10, seq)
        elif kind == "move":
            version = choose.choice(sorted(versions) or [1])
            expected = choose.choice([aliases.get(alias, (0, None))[1], 0])
            arguments = (alias, [version], expected)
            if version in versions and aliases.get(alias, (0, None))[1] == expected:
                aliases[alias], result = (version, seq), seq
        elif kind == "delete":
            version = choose.choice(sorted(versions) or [1])
            arguments = (version,)
            if version in versions and version not in {number for number, _ in aliases.values()}:
                versions.remove(version)
                deleted.append(version)
                result = True
        else:
            result = state(set(versions), *((name, *where) for name, where in aliases.items()), deleted=tuple(deleted))
        moment = 100 * seq
        history.append(
            op(
                moment - choose.randint(0, width),
                moment + choose.randint(0, width),
                kind,
                *arguments,
                result=result,
            )
        )
    return history


def planted(choose: random.Random, history: list[Operation]) -> list[Operation]:
    """Another result for one operation, or another time."""
    position = choose.randrange(len(history))
    victim = history[position]
    other = choose.choice(history)
    if choose.random() < 0.5:
        bad = replace(victim, call=other.call, end=other.call + 1)
    else:
        results = [operation.result for operation in history if operation.name == victim.name]
        bad = replace(victim, result=choose.choice([*results, None] if victim.name in ("move", "delete") else results))
    return [*history[:position], bad, *history[position + 1 :]]


def test_it_agrees_with_the_definition() -> None:
    choose = random.Random(1)
    verdicts = []
    for _ in range(1000):
        history = random_history(choose, 6, choose.choice((0, 150, 400)))
        assert linearizable(history, EMPTY, task_step)
        bad = planted(choose, history)
        verdicts.append(by_definition(bad))
        assert linearizable(bad, EMPTY, task_step) is verdicts[-1], bad
    assert 100 < verdicts.count(False) < 900


def test_long_histories_take_no_time_and_hide_no_violation() -> None:
    choose = random.Random(2)
    for _ in range(5):
        history = random_history(choose, 1000, 300)
        assert linearizable(history, EMPTY, task_step)
        reads = [i for i, operation in enumerate(history) if operation.name == "read"]
        late, early = max(reads), min(i for i in reads if history[i].result != history[max(reads)].result)
        stale = [*history[:late], replace(history[late], result=history[early].result), *history[late + 1 :]]
        assert not linearizable(stale, EMPTY, task_step)
