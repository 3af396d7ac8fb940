"""Threads of several processes on one folder: every acknowledged change is in the log once, and there is an order.

64 uploads of the same bytes, and races of two, are in test_registry_faults.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from app.registry.log import CollectVersion, Entry
from tests.checkpoints import checkpoint
from tests.linearizability import EMPTY, Operation, linearizable, task_step
from tests.registry_child import LEFTOVER_GRACE
from tests.registry_parent import Child
from tests.registry_steps import check_whole, describe, leave_leftovers, leftovers, open_registry, recover


def operation(line: dict[str, Any]) -> Operation:
    result = line["result"]
    if line["name"] == "read":
        versions, aliases, deleted = result
        shown = frozenset((name, tuple(target), etag) for name, target, etag in aliases)
        result = frozenset(versions), shown, frozenset(deleted)
    elif isinstance(result, list):
        result = tuple(result)
    return Operation(line["call"], line["end"], line["name"], tuple(line["arguments"]), result)


def check_log(root: Path, task: str, lines: list[dict[str, Any]]) -> None:
    """Each change that was made has one entry, at the place that its etag says; nothing else has."""
    entries = [Entry.parse(path.read_bytes()) for path in sorted((root / task / "log").glob("[0-9]*.json"))]
    collected = [entry.change.version for entry in entries if isinstance(entry.change, CollectVersion)]
    assert sorted(collected) == sorted({line["arguments"][0] for line in lines if line["name"] == "collect"})
    entries = [entry for entry in entries if entry.actor != "collector"]
    actors = {entry.actor: entry.seq for entry in entries}
    made = [line for line in lines if line["name"] not in ("read", "collect") and line["result"] is not None]
    assert len(actors) == len(entries) == len(made)
    assert actors.keys() == {line["actor"] for line in made}
    for line in made:
        etag = line["result"][1] if line["name"] == "publish" else line["result"]
        assert line["name"] in ("delete", "restore") or etag in (None, actors[line["actor"]])


@pytest.mark.parametrize(
    ("operations", "processes", "threads"),
    [(2_000, 2, 4), pytest.param(200_000, 4, 4, marks=[pytest.mark.long, pytest.mark.timeout(7200)])],
)
def test_histories_are_linearizable(
    registry_child: Child, memory_path: Path, operations: int, processes: int, threads: int
) -> None:
    root = memory_path / "prompts"
    each = operations // (processes * threads)
    job = {"seed": 20260102, "operations": each, "per_task": 50, "processes": processes, "threads": threads}
    # Sweeps race with uploads for these, which are old enough by then.
    littered = [f"t{number}" for number in range(min(each // 50, 20))]
    for task in littered:
        open_registry(root)._store.create(task)
        leave_leftovers(root, task)
    time.sleep(LEFTOVER_GRACE)
    started = time.monotonic()
    _, statuses = registry_child.do(root=str(root), **job)
    assert statuses == [0] * processes
    seconds = time.monotonic() - started
    histories: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for process in range(processes):
        for line in json.loads(Path(f"{root}.{process}").read_text()):
            histories[line["task"]].append(line)
    kinds: Counter[tuple[str, bool]] = Counter()
    for task, lines in histories.items():
        check_log(root, task, lines)
        assert linearizable(map(operation, lines), EMPTY, task_step), task
        kinds.update((line["name"], line["result"] is not None) for line in lines)
    registry = open_registry(root)  # in more than two seconds if the log has 100,000 entries
    check_whole(registry)
    assert len(leftovers(root)) < len(littered), "they were not swept meanwhile"
    registry.sweep(grace=-1e9)
    assert leftovers(root) == []
    check_whole(registry)
    # Neither all of them win nor none, or there was no race.
    both = [kinds[name, won] for name in ("move", "split", "roll_back", "restore") for won in (True, False)]
    assert min(*both, kinds["delete", True], kinds["publish", True], kinds["collect", True]) > each // 50, kinds
    sys.stdout.write(f"{sum(kinds.values())} operations in {seconds:.1f} s: {sorted(kinds.items())}\n")


def test_another_process_sees_a_publish_when_it_refreshes(registry_child: Child, memory_path: Path) -> None:
    root = memory_path / "prompts"
    registry = open_registry(root)
    assert registry.tasks() == []
    registry_child.do(root=str(root), step=0, at=0, torn=False)
    registry.refresh()
    assert registry.pin("t").prompt.digest == checkpoint(1).prompt.digest
    registry.publish("t", checkpoint(3), alias="mine")
    registry_child.do(root=str(root), step=1, at=0, torn=False)
    registry.refresh()
    assert list(registry.task("t").versions) == [1, 2, 3]
    assert describe(registry) == describe(recover(root))
