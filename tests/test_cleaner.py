"""What is removed for good, when, and what is not: a failure costs one task its turn, a lost entry no files."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.registry import Registry, cleaner
from tests.checkpoints import checkpoint
from tests.registry_steps import open_registry

DAY = 86_400.0


@pytest.fixture
def root(memory_path: Path) -> Path:
    return memory_path / "prompts"


def versions(root: Path, task: str = "t") -> list[str]:
    return sorted(os.listdir(root / task / "versions"))


def test_a_task_that_cannot_be_collected_costs_no_other_its_turn(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = open_registry(root)
    for task in ("a", "b", "c"):
        registry.publish(task, checkpoint(1))
        registry.delete_task(task)
    log = root / "b/log/00000002.json"
    data = log.read_bytes()
    log.write_bytes(data[:-1])
    with caplog.at_level(logging.WARNING):
        assert registry.collect(retention=0) == ["a:1", "c:1"]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["deleted versions of b stay"]
    assert [versions(root, task) for task in ("a", "b", "c")] == [[], ["1"], []]
    log.write_bytes(data)
    assert registry.collect(retention=0) == ["b:1"]


class Clock:
    """Monotonic time as the cleaner sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1e6
        monkeypatch.setattr(cleaner, "time", SimpleNamespace(monotonic=lambda: self.seconds, time=time.time))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def sweep(registry: Registry, **arguments: Any) -> int:
    """Of files that are as old as can be."""
    return registry.sweep(grace=-1e9, retention=7 * DAY, **arguments)


def lose(root: Path, seq: int) -> bytes:
    path = root / f"t/log/{seq:08d}.json"
    data = path.read_bytes()
    path.unlink()
    return data


def test_files_of_a_version_whose_entry_was_lost_can_be_had_back(root: Path, clock: Clock) -> None:
    """A start cannot tell them from an upload that died. Whoever notices the loss has as long as for a deletion."""
    first = open_registry(root)
    for content in (1, 2):
        first.publish("t", checkpoint(content))
    (root / "t/versions/.tmp-0123").mkdir()
    entry = lose(root, 2)
    registry = open_registry(root)
    assert sweep(registry) == 1 and versions(root) == ["1", "2"]
    clock.seconds += 6 * DAY
    assert sweep(registry) == 0 and versions(root) == ["1", "2"]
    (root / "t/log/00000002.json").write_bytes(entry)
    clock.seconds += 2 * DAY
    assert sweep(registry) == 0 and registry.pin("t:2").version.number == 2
    # Lost once more: it has all of its time again.
    lose(root, 2)
    again = open_registry(root)
    assert sweep(again) == 0
    clock.seconds += 8 * DAY
    assert sweep(again) == 1 and versions(root) == ["1"]


def test_a_time_that_was_cut_short_starts_anew(root: Path, clock: Clock) -> None:
    registry = open_registry(root)
    registry.publish("t", checkpoint(1))
    late = root / "t/versions/9"
    for _ in range(3):
        late.mkdir()
        (late / "file").write_bytes(b"x")
        assert sweep(registry) == 0
        clock.seconds += 6 * DAY
        (late / "file").unlink()
        late.rmdir()
        assert sweep(registry) == 0


def test_without_a_log_only_temporary_files_go(root: Path, clock: Clock) -> None:
    """A backup is put back, its versions first, or the log is what was lost."""
    open_registry(root).publish("t", checkpoint(1))
    entry = lose(root, 1)
    (root / "t/versions/.tmp-0123").mkdir()
    (root / "t/log/.tmp-0123").write_bytes(b"x")
    registry = open_registry(root)
    assert registry.tasks() == []
    assert registry.sweep(grace=-1e9) == 2 and versions(root) == ["1"]
    clock.seconds += 1000 * DAY
    assert sweep(registry) == 0 and versions(root) == ["1"]
    (root / "t/log/00000001.json").write_bytes(entry)
    registry.refresh()
    assert registry.pin("t").prompt.digest == checkpoint(1).prompt.digest


def test_threads_that_sweep_take_turns(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it remembers between sweeps is for one at a time."""
    registry = open_registry(root)
    for task in ("a", "b"):
        registry.publish(task, checkpoint(1))
    numbers, inside, most = registry._store.numbers, 0, 0

    def slow(task: str) -> frozenset[int]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        inside -= 1
        return numbers(task)

    monkeypatch.setattr(registry._store, "numbers", slow)
    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(lambda _: registry.sweep(), range(4))] == [0] * 4
    assert most == 1
