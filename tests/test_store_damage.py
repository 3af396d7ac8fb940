"""Damaged files: every one is noticed, costs one version or one task, is logged once, and mended by an upload."""

from __future__ import annotations

import errno
import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.checkpoint import CONFIG_FILE, MANIFEST_FILE, TENSORS_FILE
from app.errors import NotReady, PromptCorrupt, ReferenceNotFound
from app.registry import Registry, log
from tests.checkpoints import checkpoint
from tests.interposed_files import Interposed
from tests.registry_steps import describe, leftovers, open_registry

FILES = (CONFIG_FILE, TENSORS_FILE, MANIFEST_FILE)


@pytest.fixture
def root(memory_path: Path) -> Path:
    return memory_path / "prompts"


@pytest.fixture
def registry(root: Path) -> Registry:
    """The tasks `bad` and `good`, of three versions each."""
    registry = open_registry(root)
    for task in ("bad", "good"):
        for content in (1, 2, 3):
            registry.publish(task, checkpoint(content))
    return registry


def damaged(data: bytes, *, every: int = 1) -> Iterator[bytes]:
    """Each byte with a bit flipped, every length (or one of so many), zeros, and something at the end."""
    choose = random.Random(3)
    for position in range(len(data)):
        yield data[:position] + bytes([data[position] ^ 1 << choose.randrange(8)]) + data[position + 1 :]
    yield from (data[:length] for length in range(0, len(data), every))
    yield from (bytes(len(data)), data + b"\n", data + data)


@pytest.mark.parametrize("name", FILES)
def test_every_damage_of_a_version_is_noticed_and_costs_that_version(registry: Registry, root: Path, name: str) -> None:
    path = root / "bad/versions/2" / name
    data = path.read_bytes()
    served = describe(registry)
    tried = 0
    for bad in damaged(data):
        path.write_bytes(bad)
        with pytest.raises(PromptCorrupt, match="bad:2"):
            registry.read_file("bad", 2, name)
        tried += 1
        if tried % 100 == 1:  # the same check at a start and at a load
            fresh = open_registry(root)
            assert describe(fresh) == served
            if name != MANIFEST_FILE:  # what a load needs of it is in the log
                with pytest.raises(PromptCorrupt):
                    fresh.pin("bad:2")
            for reference in ("bad:1", "bad:3", "good:1", "good:2", "good:3"):
                fresh.pin(reference).release()
    path.write_bytes(data)
    assert registry.read_file("bad", 2, name) == data
    assert tried > 2 * len(data)


@pytest.mark.parametrize("seq", [1, pytest.param(2, marks=pytest.mark.long), 3])
def test_every_damage_of_a_log_entry_is_noticed_and_costs_that_task(registry: Registry, root: Path, seq: int) -> None:
    path = root / f"bad/log/{seq:08d}.json"
    data = path.read_bytes()
    served = describe(registry)
    for bad in damaged(data, every=11):
        path.write_bytes(bad)
        fresh = open_registry(root)
        assert describe(fresh) == {"good": served["good"]}
    for call in (fresh.task, fresh.pin, lambda name: fresh.publish(name, checkpoint(9))):
        with pytest.raises(PromptCorrupt):
            call("bad")
    fresh.pin("good").release()
    # Whoever has read these entries before serves the task on, and nothing of it is swept.
    registry.refresh()
    assert registry.pin("bad:3").version.number == 3
    fresh.sweep(grace=-1e9)
    path.write_bytes(data)
    fresh.refresh()
    assert describe(fresh) == served


@pytest.mark.parametrize("damage", ["flipped", "cut", "of a later release"])
def test_a_new_entry_that_cannot_be_used_costs_who_serves_the_task_nothing(
    registry: Registry, root: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    head = registry._index.state("bad").head
    other = open_registry(root)
    other.publish("bad", checkpoint(4))
    path = root / "bad/log/00000004.json"
    data = path.read_bytes()
    line = {"seq": 4, "prev": head.digest, "op": "new", "payload": {}, "actor": "x", "time": log.now()}
    bad = {"flipped": data.replace(b"publish", b"pvblish"), "cut": data[:-1], "of a later release": log._sealed(line)}
    path.write_bytes(bad[damage])
    served = describe(registry)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            registry.refresh()
    assert [record.getMessage() for record in caplog.records] == [
        "the log of the task bad cannot be used: entry 4 is damaged"
    ]
    assert describe(registry) == served and registry.pin("bad").version.number == 3
    for write in (lambda: registry.publish("bad", checkpoint(5)), lambda: registry.delete_version("bad", 1)):
        with pytest.raises(PromptCorrupt):
            write()
    with pytest.raises(PromptCorrupt):
        open_registry(root).pin("bad")
    path.write_bytes(data)
    registry.refresh()
    assert describe(registry) == describe(other) and registry.pin("bad").version.number == 4


def test_swapped_versions_and_entries_are_noticed(registry: Registry, root: Path) -> None:
    versions = root / "bad/versions"
    for one, other in (("1", "2"), (f"1/{TENSORS_FILE}", f"2/{TENSORS_FILE}"), ("1", "../../good/versions/2")):
        swap(versions / one, versions / other)
        fresh = open_registry(root)
        for reference in ("bad:1", "bad:2" if "good" not in other else "good:2"):
            with pytest.raises(PromptCorrupt):
                fresh.pin(reference)
        fresh.pin("bad:3").release()
        swap(versions / one, versions / other)
    for one, other in (("1", "2"), ("2", "3")):
        swap(root / f"bad/log/0000000{one}.json", root / f"bad/log/0000000{other}.json")
        assert list(describe(open_registry(root))) == ["good"]
        swap(root / f"bad/log/0000000{one}.json", root / f"bad/log/0000000{other}.json")
    # Two tasks' logs may trade places, but their versions then do not fit.
    registry.publish("good", checkpoint(4))
    swap(root / "bad/log", root / "good/log")
    with pytest.raises(PromptCorrupt):
        open_registry(root).pin("bad:4")


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_damage_is_logged_once_until_it_is_mended(
    registry: Registry, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = root / "bad/versions/2" / TENSORS_FILE
    data = path.read_bytes()

    def use() -> list[str]:
        caplog.clear()
        for _ in range(20):
            with pytest.raises(PromptCorrupt):
                registry.pin("bad:2")
        return [record.getMessage() for record in caplog.records]

    with caplog.at_level(logging.ERROR):
        path.write_bytes(data[:-1])
        assert use() == [f"bad:2: {TENSORS_FILE} does not match its digest; it is not served"]
        assert use() == []
        path.write_bytes(data)
        registry.pin("bad:2").release()
        registry._prompts.forget(("bad", 2, registry.version("bad", 2).digest))
        path.write_bytes(b"")
        assert len(use()) == 1


def test_an_upload_mends_and_the_damage_stays_for_the_operator(registry: Registry, root: Path) -> None:
    path = root / "bad/versions/3" / TENSORS_FILE
    path.write_bytes(b"damaged")
    with pytest.raises(PromptCorrupt):
        registry.pin("bad")
    published = registry.publish("bad", checkpoint(3))
    assert published.created and published.version.number == 4
    assert registry.pin("bad").prompt.digest == checkpoint(3).prompt.digest
    registry.sweep(grace=-1e9)
    assert path.read_bytes() == b"damaged"
    with pytest.raises(PromptCorrupt):
        registry.pin("bad:3")


def test_an_upload_mends_a_file_that_cannot_be_read(root: Path) -> None:
    class Bad(Interposed):
        def around(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
            if name == "read" and str(args[0]).endswith(f"versions/1/{TENSORS_FILE}"):
                raise OSError(errno.EIO, "Input/output error")
            return super().around(name, call, *args)

    registry = open_registry(root, Bad())
    registry.publish("bad", checkpoint(1))
    with pytest.raises(NotReady):
        registry.pin("bad")
    published = registry.publish("bad", checkpoint(1))
    assert published.created and registry.pin("bad").version.number == 2
    assert not registry.publish("bad", checkpoint(1)).created


def test_a_task_in_memory_is_served_on_when_its_files_are_damaged(registry: Registry, root: Path) -> None:
    registry.pin("bad:1").release()
    for name in FILES:
        (root / "bad/versions/1" / name).write_bytes(b"")
    for path in (root / "bad/log").iterdir():
        path.write_bytes(b"")
    registry.refresh()
    assert registry.pin("bad:1").prompt.digest == checkpoint(1).prompt.digest


def test_one_damaged_task_of_many_costs_itself(registry: Registry, root: Path) -> None:
    for number in range(20):
        registry.publish(f"task-{number}", checkpoint(number))
    (root / "task-7/log/00000001.json").unlink()
    (root / "task-7/log/00000002.json").write_bytes(b"{}")
    fresh = open_registry(root)
    assert len(fresh.tasks()) == 21
    with pytest.raises(PromptCorrupt):
        fresh.pin("task-7")


def test_the_loss_of_the_last_entries_is_not_noticed_by_a_start(registry: Registry, root: Path) -> None:
    """A chain has no end that could be missed: an earlier state comes back. Who knew better finds out by writing."""
    (root / "bad/log/00000003.json").unlink()
    late = open_registry(root)
    assert list(late.task("bad").versions) == [1, 2] and late.resolve("bad").number == 2
    assert registry.resolve("bad").number == 3
    with pytest.raises(PromptCorrupt, match="entry 3 was changed or lost"):
        registry.publish("bad", checkpoint(6))
    # The folder that the lost entry named is still taken, so its number is not used for something else.
    assert late.publish("bad", checkpoint(5)).version.number == 4
    with pytest.raises(PromptCorrupt, match="entry 3 was changed or lost"):
        registry.publish("bad", checkpoint(6))
    assert describe(open_registry(root)) == describe(late)
    late.sweep(grace=-1e9)
    assert leftovers(root) == []


SWEPT = ["bad/log/.tmp-1", "bad/versions/.tmp-1", "bad/versions/5", "bad/versions/9"]


@pytest.fixture
def littered(registry: Registry, root: Path) -> Registry:
    for folder in (".tmp-1", "5", "9"):
        (root / "bad/versions" / folder).mkdir()
        (root / "bad/versions" / folder / "deeper").mkdir()
        (root / "bad/versions" / folder / "deeper/file").write_bytes(b"x")
    (root / "bad/log/.tmp-1").write_bytes(b"x")
    return registry


def test_a_sweep_takes_what_is_old_and_unknown(littered: Registry, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ["README.md", "log/00000004.json.bak", "versions/07", "versions/notes", "versions/10"]
    for name in kept:
        (root / "bad" / name).write_text("an operator's")
    littered.delete_version("bad", 1)
    served = describe(littered)
    assert littered.sweep() == 0 and sorted(leftovers_of(root)) == SWEPT
    now = os.stat(root / "bad/versions/5").st_ctime
    monkeypatch.setattr("time.time", lambda: now + 3599)
    assert littered.sweep() == 0 and sorted(leftovers_of(root)) == SWEPT
    monkeypatch.setattr("time.time", lambda: now + 3700)
    assert littered.sweep() == 4 and leftovers_of(root) == []
    assert littered.sweep() == 0
    assert all((root / "bad" / name).exists() for name in [*kept, "versions/1"])
    assert describe(open_registry(root)) == served
    for version in (2, 3):
        littered.pin(f"bad:{version}").release()


def leftovers_of(root: Path) -> list[str]:
    return [name for name in SWEPT if (root / name).exists()]


def test_what_was_copied_here_is_as_young_as_the_copy(littered: Registry, root: Path) -> None:
    """A backup that is put back brings old times, and its versions before their log."""
    os.utime(root / "bad/versions/5", (0, 0))
    assert littered.sweep() == 0


def test_a_sweep_follows_no_link(littered: Registry, root: Path, memory_path: Path) -> None:
    outside = memory_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("x")
    (root / "bad/versions/6").symlink_to(outside)
    (root / "bad/versions/9/link").symlink_to(outside)
    littered.sweep(grace=-1e9)
    assert sorted(os.listdir(root / "bad/versions")) == ["1", "2", "3"]
    assert (outside / "file").read_text() == "x"


def test_a_task_with_a_damaged_log_or_without_one_is_not_swept(littered: Registry, root: Path) -> None:
    littered.refresh()
    entry = root / "bad/log/00000002.json"
    data = entry.read_bytes()
    entry.write_bytes(data[:-1])
    fresh = open_registry(root)
    assert fresh.sweep(grace=-1e9) == 0
    entry.write_bytes(data)
    (root / "bad/log").rename(root / "aside")
    assert open_registry(root).sweep(grace=-1e9) == 0
    (root / "aside").rename(root / "bad/log")
    assert leftovers(root) and all((root / name).exists() for name in SWEPT)
    fresh.refresh()
    with pytest.raises(ReferenceNotFound):
        fresh.pin("bad:9")


@pytest.mark.parametrize("swept", [False, True])
def test_the_number_of_an_upload_that_died_is_used_only_once(littered: Registry, root: Path, swept: bool) -> None:
    if swept:
        littered.sweep(grace=-1e9)
    numbers = [littered.publish("bad", checkpoint(content)).version.number for content in (4, 5, 6)]
    assert numbers == ([4, 5, 6] if swept else [4, 6, 7])
    littered.sweep(grace=-1e9)
    fresh: Callable[[], Registry] = lambda: open_registry(root)  # noqa: E731
    for number, content in zip(numbers, (4, 5, 6), strict=True):
        assert fresh().pin(f"bad:{number}").prompt.digest == checkpoint(content).prompt.digest
    assert littered.publish("bad", checkpoint(7)).version.number == numbers[-1] + 1
