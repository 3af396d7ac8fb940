"""kill -9 at every call of the store and at random times: what was acknowledged is there, nothing is torn."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.registry import Registry
from tests.interposed_files import WRITES, Interposed
from tests.registry_child import TASKS
from tests.registry_parent import Child
from tests.registry_steps import STEPS, build_states, describe, leftovers, open_registry, recover, retry


class Noting(Interposed):
    """Writes down what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def around(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        self.calls.append(name)
        return super().around(name, call, *args)


@pytest.mark.parametrize("reads", [False, pytest.param(True, marks=pytest.mark.long)], ids=["writes", "all"])
@pytest.mark.parametrize("position", range(len(STEPS)), ids=[step.name for step in STEPS])
def test_killed_at_every_call(registry_child: Child, memory_path: Path, position: int, reads: bool) -> None:
    """Before each call that writes (before one that reads, the folder is as before the next), and half-way."""
    step, root = STEPS[position], memory_path / "prompts"
    states, make = build_states(memory_path)
    before, after = states[position], states[position + 1]
    make(position, root)
    noting = Noting()
    step.run(open_registry(root, noting))
    kills = [(at, False) for at, name in enumerate(noting.calls, 1) if reads or name in WRITES]
    kills += [(at, True) for at, name in enumerate(noting.calls, 1) if name == "write"]
    outcomes = set()
    for at, torn in [*kills, (len(noting.calls) + 1, False)]:
        make(position, root)
        said, [status] = registry_child.do(root=str(root), step=position, at=at, torn=torn)
        acknowledged = at > len(noting.calls)
        assert (said, status) == (([{"ack": position}], 0) if acknowledged else ([], signal.SIGKILL))
        registry = recover(root)
        found = describe(registry)
        assert found in ((after,) if acknowledged else (before, after))
        outcomes.add(found == after)
        retry(step, registry, before)
        registry.sweep(grace=-1e9)
        assert leftovers(root) == []
        assert describe(registry) == describe(recover(root)) == after
    assert len(kills) > 3 and outcomes == ({True} if before == after else {False, True})


class Expectation:
    """What the processes that were killed have been told, and what they may have done beyond that."""

    def __init__(self) -> None:
        self.versions: dict[str, dict[int, str]] = {task: {} for task in TASKS}  # acknowledged and not deleted
        self.aliases: dict[tuple[str, str], int] = {}
        self.acknowledged = 0
        self.checked: set[tuple[str, int]] = set()

    def take(self, said: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Learn what was acknowledged; return what was begun only."""
        begun: dict[int, dict[str, Any]] = {}
        for line in said:
            if line.pop("begin", False):
                begun[line["writer"]] = line
                continue
            del begun[line["writer"]]
            self.acknowledged += 1
            match line["op"]:
                case "publish":
                    self.versions[line["task"]][line["version"]] = line["digest"]
                case "alias":
                    self.aliases[line["task"], f"w{line['writer']}"] = line["version"]
                case "delete":
                    del self.versions[line["task"]][line["version"]]
        return list(begun.values())

    def check(self, registry: Registry, begun: list[dict[str, Any]]) -> None:
        """Every acknowledged change is there, and of the others only those that were begun, and whole."""
        assert not registry._index._snapshot.problems
        found = {name: {} for name in TASKS} | {task.name: dict(task.versions) for task in registry.tasks()}
        for line in begun:
            known = self.versions[line["task"]]
            match line["op"]:
                case "publish":
                    made = [number for number, v in found[line["task"]].items() if v.digest == line["digest"]]
                    assert len(made) <= 1
                    known |= dict.fromkeys(made, line["digest"])
                case "delete" if line["version"] not in found[line["task"]]:
                    del known[line["version"]]
                case "alias":
                    key = line["task"], f"w{line['writer']}"
                    there = registry.task(line["task"]).aliases.get(key[1])
                    if there and there.version == line["version"]:
                        self.aliases[key] = there.version
        for name, versions in found.items():
            assert {number: version.digest for number, version in versions.items()} == self.versions[name]
        aliases = {
            (task.name, alias.name): alias.version for task in registry.tasks() for alias in task.aliases.values()
        }
        assert aliases == self.aliases

    def check_files(self, registry: Registry, *, all_of_them: bool) -> None:
        for task in registry.tasks():
            for version in task.versions.values():
                if all_of_them or (task.name, version.number) not in self.checked:
                    self.checked.add((task.name, version.number))
                    for name in version.files:
                        registry.read_file(task.name, version.number, name)


@pytest.mark.parametrize(
    ("kills", "writers"),
    [(20, 2), pytest.param(2000, 4, marks=[pytest.mark.long, pytest.mark.timeout(3600)])],
)
def test_killed_at_random_times(
    registry_child: Child, tmp_path: Path, kills: int, writers: int, record_property: pytest.RecordProperty
) -> None:
    choose = random.Random(20260101)
    acknowledged = unknown = 0
    slowest = 0.0
    per_life = min(kills, 50)
    for life in range(kills // per_life):
        root, expectation = tmp_path / str(life), Expectation()
        for kill in range(per_life):
            said, statuses = registry_child.do(
                root=str(root), seed=f"{life}/{kill}", writers=writers, seconds=choose.uniform(0.01, 0.12)
            )
            assert statuses == [signal.SIGKILL] * writers
            begun = expectation.take(said)
            unknown += len(begun)
            started = time.monotonic()
            registry = open_registry(root)
            slowest = max(slowest, time.monotonic() - started)
            expectation.check(registry, begun)
            expectation.check_files(registry, all_of_them=kill == per_life - 1)
            registry.sweep(grace=-1e9)
            assert leftovers(root) == []
        acknowledged += expectation.acknowledged
    assert slowest < 2
    assert acknowledged > kills
    record_property("kills", f"{kills} kills of {writers} writers, {acknowledged} acknowledged, {unknown} cut off")
    sys.stdout.write(f"{kills} kills, {acknowledged} acknowledged, {unknown} cut off, start <= {slowest:.3f} s\n")
