"""The registry when things go wrong: races of threads and processes, crashes, failing disks, damage."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from app.errors import (
    NotReady,
    PreconditionFailed,
    PromptCorrupt,
    ReferenceNotFound,
)
from app.registry import Registry, Store
from app.registry.log import Entry
from tests.checkpoints import BASE, TENSORS_FILE, checkpoint, log_entries


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "prompts"


@pytest.fixture
def registry(root: Path) -> Registry:
    return Registry(Store(root), BASE)


def test_64_uploads_of_the_same_content_at_once_are_one_version(registry: Registry, root: Path) -> None:
    content = checkpoint(1)
    barrier = threading.Barrier(64)

    def publish(_: int) -> bool:
        barrier.wait()
        return registry.publish("t", content).created

    with ThreadPoolExecutor(64) as threads:
        assert sum(threads.map(publish, range(64))) == 1
    assert os.listdir(root / "t/versions") == ["1"]
    assert len(log_entries(root, "t")) == 1


def test_concurrent_publishes_are_all_kept(root: Path) -> None:
    """Eight threads on two registries, as two processes would have."""
    registries = [Registry(Store(root), BASE) for _ in range(2)]
    contents = [checkpoint(i) for i in range(32)]

    def publish(thread: int) -> list[tuple[int, int]]:
        numbers = []
        for content in range(4 * thread, 4 * thread + 4):
            version = registries[thread % 2].publish("t", contents[content]).version
            numbers.append((version.number, content))
        return numbers

    with ThreadPoolExecutor(8) as threads:
        acknowledged = dict(pair for pairs in threads.map(publish, range(8)) for pair in pairs)
    assert sorted(acknowledged) == list(range(1, 33))
    assert len(log_entries(root, "t")) == 32
    fresh = Registry(Store(root), BASE)
    for number, content in acknowledged.items():
        assert torch.all(fresh.pin(f"t:{number}").prompt.tensor == content)
    for registry in registries:
        registry.refresh()
        assert registry.tasks() == fresh.tasks()


def test_of_two_racing_alias_moves_one_wins(registry: Registry, root: Path) -> None:
    other = Registry(Store(root), BASE)
    for content in range(2):
        registry.publish("t", checkpoint(content), alias=None)
    registry.move_alias("t", "prod", 1, expected=None)
    other.refresh()
    with ThreadPoolExecutor(2) as threads:
        for _ in range(20):
            etag = registry.task("t").aliases["prod"].etag
            barrier = threading.Barrier(2)

            def move(mover: Registry, version: int, barrier: threading.Barrier = barrier, etag: int = etag) -> bool:
                barrier.wait()
                try:
                    return mover.move_alias("t", "prod", version, expected=etag).version == version
                except PreconditionFailed:
                    return False

            assert sorted(threads.map(move, (registry, other), (1, 2))) == [False, True]
            registry.refresh()
    assert len(log_entries(root, "t")) == 2 + 1 + 20


def race(root: Path, me: int, other: int) -> set[int]:
    """In each of 40 turns, create an alias at the moment another process does; return the turns won."""
    registry = Registry(Store(root), BASE)
    won = set()
    for turn in range(40):
        (root.parent / f"{me}.{turn}").touch()
        while not (root.parent / f"{other}.{turn}").exists():
            time.sleep(0.0001)
        try:
            registry.move_alias("t", f"alias-{turn}", me, expected=None, actor=str(me))
            won.add(turn)
        except PreconditionFailed:
            pass
    return won


def test_of_two_racing_processes_one_wins(registry: Registry, root: Path) -> None:
    registry.publish("t", checkpoint(1))
    registry.publish("t", checkpoint(2))
    program = (
        "import sys, pathlib, tests.test_registry_faults as t; "
        "sys.stdout.write(' '.join(map(str, t.race(pathlib.Path(sys.argv[1]), 2, 1))))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(root)], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    ) as process:
        won = race(root, 1, 2)
        lost = {int(turn) for turn in process.communicate()[0].split()}
    assert process.returncode == 0
    assert won.isdisjoint(lost) and won | lost == set(range(40))
    registry.refresh()
    for turn in range(40):
        assert registry.resolve(f"t@alias-{turn}").number == (1 if turn in won else 2)
    assert len(log_entries(root, "t")) == 42


def test_leftovers_of_crashed_publishes_do_not_exist(registry: Registry, root: Path) -> None:
    registry.publish("t", checkpoint(1))
    upload = root / "t/versions/1"
    shutil.copytree(upload, root / "t/versions/.tmp-0123")  # killed before the rename
    shutil.copytree(upload, root / "t/versions/2")  # killed between the rename and the log entry
    (root / "t/versions/3").mkdir()
    (root / "t/log/.tmp-0123").write_bytes(b'{"seq": 2')
    (root / "u/versions").mkdir(parents=True)
    fresh = Registry(Store(root), BASE)
    assert fresh.tasks() == registry.tasks()
    with pytest.raises(ReferenceNotFound):
        fresh.pin("t:2")
    version = fresh.publish("t", checkpoint(2)).version
    assert version.number == 3 and fresh.pin("t").prompt.digest == version.digest
    assert fresh.publish("u", checkpoint(2)).version.number == 1
    assert len(Registry(Store(root), BASE).tasks()) == 2


def test_a_publish_whose_outcome_is_unknown_keeps_its_files(
    registry: Registry, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry was linked, then the disk failed: nothing is acknowledged, but others may have seen it."""
    original = Store.append

    def append(self: Store, task: str, entry: Entry) -> bool:
        original(self, task, entry)
        raise NotReady("the folder could not be synced")

    monkeypatch.setattr(Store, "append", append)
    with pytest.raises(NotReady):
        registry.publish("t", checkpoint(1))
    monkeypatch.undo()
    assert torch.all(Registry(Store(root), BASE).pin("t").prompt.tensor == 1)
    assert not registry.publish("t", checkpoint(1)).created


def test_damaged_files_cost_one_version(registry: Registry, root: Path) -> None:
    for content in range(3):
        registry.publish("t", checkpoint(content))
    path = root / "t/versions/2" / TENSORS_FILE
    data = path.read_bytes()
    for bad in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1], b"", checkpoint(5).tensors, None):
        path.unlink()
        if bad is not None:
            path.write_bytes(bad)
        for use in (lambda: registry.pin("t:2"), lambda: registry.read_file("t", 2, TENSORS_FILE)):
            with pytest.raises(PromptCorrupt, match="t:2"):
                use()
        assert registry.pins(registry.version("t", 2)) == 0
    (root / "t/versions/3/manifest.json").write_bytes(b"{}")
    with pytest.raises(PromptCorrupt, match=r"t:3: manifest\.json"):
        registry.read_file("t", 3, "manifest.json")
    fresh = Registry(Store(root), BASE)
    assert fresh.tasks() == registry.tasks()
    for number in (1, 3):
        assert torch.all(fresh.pin(f"t:{number}").prompt.tensor == number - 1)
    path.write_bytes(data)
    assert torch.all(fresh.pin("t:2").prompt.tensor == 1)


@pytest.mark.parametrize("damage", ["flip", "remove", "swap", "rewrite", "garbage"])
def test_a_damaged_log_costs_one_task(
    registry: Registry, root: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    for content in range(3):
        registry.publish("bad", checkpoint(content))
    registry.publish("good", checkpoint(1))
    log = root / "bad/log"
    saved = {path: path.read_bytes() for path in log.iterdir()}
    first, second, third = (log / f"0000000{seq}.json" for seq in (1, 2, 3))
    match damage:
        case "flip":
            third.write_bytes(saved[third].replace(b'"version": 3', b'"version": 4'))
        case "remove":
            second.unlink()
        case "swap":
            second.write_bytes(saved[third])
            third.write_bytes(saved[second])
        case "rewrite":
            head = Entry.parse(saved[first]).head
            second.write_bytes(Entry.after(head, Entry.parse(saved[second]).change, "mallory").data)
        case "garbage":
            first.write_bytes(b"\xff" * 100)
    with caplog.at_level(logging.ERROR):
        fresh = Registry(Store(root), BASE)
        fresh.refresh()
    assert [record.getMessage().startswith("the log of the task bad") for record in caplog.records] == [True]
    for call in (fresh.task, fresh.pin, lambda name: fresh.publish(name, checkpoint(9))):
        with pytest.raises(PromptCorrupt):
            call("bad")
    assert [task.name for task in fresh.tasks()] == ["good"]
    assert fresh.pin("good").version.number == 1
    for path, data in saved.items():
        path.write_bytes(data)
    fresh.refresh()
    assert fresh.tasks() == registry.tasks()


def test_the_registry_is_served_on_when_its_folder_goes(
    registry: Registry, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry.publish("t", checkpoint(1))
    registry.pin("t").release()
    root.rename(root.parent / "elsewhere")
    registry.refresh()
    assert "could not be refreshed" in caplog.text
    assert registry.pin("t").version.number == 1
    with pytest.raises(NotReady):
        registry.publish("t", checkpoint(2))
    with pytest.raises(NotReady):
        registry.publish("new", checkpoint(2))
    (root.parent / "elsewhere").rename(root)
    assert registry.publish("t", checkpoint(2)).version.number == 2


def test_a_failed_read_reaches_every_waiting_request_and_is_tried_again(registry: Registry, root: Path) -> None:
    version = registry.publish("t", checkpoint(1)).version
    path = root / "t/versions/1" / TENSORS_FILE
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with ThreadPoolExecutor(16) as threads:
        failures = [threads.submit(registry.pin, "t") for _ in range(16)]
        assert all(isinstance(failure.exception(60), PromptCorrupt) for failure in failures)
    assert registry.pins(version) == 0
    path.write_bytes(data)
    assert registry.pin("t").version == version
