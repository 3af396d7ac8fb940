"""The registry over a real folder: publishing, restarts, aliases, deleting, pins, host memory."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.checkpoint import Checkpoint, read_checkpoint
from app.errors import (
    InvalidPromptFile,
    InvalidRequest,
    PreconditionFailed,
    ReferenceNotFound,
)
from app.manifest import Defaults, ManifestInput
from app.registry import Alias, Registry, Store, Target, Version
from app.registry import files as files_module
from app.soft_prompt import BaseInfo, SoftPrompt
from tests.checkpoints import BASE, TENSORS_FILE, checkpoint, log_entries


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "prompts"


@pytest.fixture
def registry(root: Path) -> Registry:
    return Registry(Store(root), BASE)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The versions whose prompts are read from disk, in order."""
    seen: list[str] = []
    original = Store.read_file

    def read_file(self: Store, task: str, number: int, name: str) -> bytes | None:
        if name == TENSORS_FILE:
            seen.append(f"{task}:{number}")
        return original(self, task, number, name)

    monkeypatch.setattr(Store, "read_file", read_file)
    yield seen


def test_a_version_is_published_resolved_and_pinned(registry: Registry, root: Path) -> None:
    published = registry.publish("mood", checkpoint(1, template="{input} ->", tags={"a": "é"}), actor="ann")
    version = published.version
    assert published.created and published.alias == Alias("latest", Target.of(1), 1)
    assert (version.reference, version.manifest.num_virtual_tokens) == ("mood:1", 4)
    for reference in ("mood", "mood:1", "mood@latest", f"mood@{version.digest}"):
        assert registry.resolve(reference) == version
    pin = registry.pin("mood")
    assert pin.version == version and pin.prompt.digest == version.digest
    assert torch.equal(pin.prompt.tensor, torch.ones(4, 8))
    assert registry.read_file("mood", 1, TENSORS_FILE) == checkpoint(1).tensors
    stored = json.loads(registry.read_file("mood", 1, "manifest.json"))
    assert stored == version.manifest.model_dump(mode="json")
    assert sorted(os.listdir(root / "mood/versions/1")) == sorted(version.files)
    [entry] = log_entries(root, "mood")
    assert (entry["op"], entry["actor"], entry["payload"]["alias"]) == ("publish", "ann", "latest")


def test_a_restart_changes_nothing_and_reads_no_tensor(registry: Registry, root: Path, reads: list[str]) -> None:
    defaults = Defaults(max_tokens=3, temperature=1, stop=["\n", "。"])
    registry.publish("b", checkpoint(1, defaults=defaults, labels=["x", "y"], metrics={"f1": 0.1, "n": [1, 2.0, None]}))
    registry.publish("b", checkpoint(2, description="two"), alias=None)
    registry.publish("b", checkpoint(3), alias="canary.1")
    registry.move_alias("b", "prod", 2, expected=None)
    registry.move_alias("b", "canary.1", 2, expected=3)
    registry.delete_version("b", 3)
    registry.publish("a", checkpoint(1))
    registry.publish("gone", checkpoint(1))
    registry.delete_task("gone")
    again = Registry(Store(root), BASE)
    assert again.tasks() == registry.tasks()
    assert [task.name for task in again.tasks()] == ["a", "b"]
    assert again.task("b").aliases == {
        "latest": Alias("latest", Target.of(1), 1),
        "prod": Alias("prod", Target.of(2), 4),
        "canary.1": Alias("canary.1", Target.of(2), 5),
    }
    assert reads == []
    assert torch.equal(again.pin("b@prod").prompt.tensor, torch.full((4, 8), 2.0))
    assert torch.equal(again.pin("b").prompt.tensor, torch.ones(4, 8))


def test_same_content_is_one_version_per_task(registry: Registry, root: Path) -> None:
    first = registry.publish("t", checkpoint(1))
    registry.publish("t", checkpoint(2))
    again = registry.publish("t", checkpoint(1), alias="prod")
    assert (again.created, again.version) == (False, first.version)
    assert again.alias == Alias("prod", Target.of(1), 3)
    back = registry.publish("t", checkpoint(1))
    assert back.alias == Alias("latest", Target.of(1), 4)
    assert registry.publish("t", checkpoint(1)) == replace(back)  # nothing to do, so nothing is logged
    assert registry.publish("t", checkpoint(1), alias=None).alias is None
    assert [entry["op"] for entry in log_entries(root, "t")] == ["publish", "publish", "alias", "alias"]
    assert registry.publish("t", checkpoint(1, description="other")).version.number == 3
    assert registry.publish("u", checkpoint(1)).created
    assert sorted(os.listdir(root / "t/versions")) == ["1", "2", "3"]


def test_alias_preconditions(registry: Registry) -> None:
    registry.publish("t", checkpoint(1))
    registry.publish("t", checkpoint(2))
    assert registry.move_alias("t", "latest", 1, expected=2) == Alias("latest", Target.of(1), 3)
    for alias, version, expected in (("latest", 2, 2), ("latest", 2, None), ("prod", 1, 3)):
        with pytest.raises(PreconditionFailed):
            registry.move_alias("t", alias, version, expected=expected)
    with pytest.raises(ReferenceNotFound):
        registry.move_alias("t", "latest", 3, expected=3)
    with pytest.raises(ReferenceNotFound):
        registry.move_alias("nowhere", "latest", 1, expected=None)
    with pytest.raises(InvalidRequest):
        registry.move_alias("t", "7", 1, expected=None)
    assert registry.task("t").aliases == {"latest": Alias("latest", Target.of(1), 3)}


def test_deleting(registry: Registry, root: Path) -> None:
    registry.publish("t", checkpoint(1))
    with pytest.raises(PreconditionFailed, match="t:1 is named by the alias latest"):
        registry.delete_version("t", 1)
    registry.publish("t", checkpoint(2), alias="prod")
    registry.publish("t", checkpoint(3))
    pin = registry.pin("t:1")
    registry.delete_version("t", 1)
    for reference in ("t:1", f"t@{pin.version.digest}"):
        with pytest.raises(ReferenceNotFound):
            registry.pin(reference)
    with pytest.raises(ReferenceNotFound):
        registry.read_file("t", 1, TENSORS_FILE)
    assert torch.equal(pin.prompt.tensor, torch.ones(4, 8)) and registry.pins(pin.version) == 1
    assert sorted(os.listdir(root / "t/versions")) == ["1", "2", "3"]  # until it is collected
    with pytest.raises(PreconditionFailed, match="the task has the alias prod"):
        registry.delete_task("t")
    # The same content again is a new version: numbers are never used twice.
    assert registry.publish("t", checkpoint(1), alias="prod").version.number == 4
    assert list(registry.task("t").versions) == [2, 3, 4]


def test_a_deleted_task_is_gone_and_its_numbers_too(registry: Registry, root: Path) -> None:
    registry.publish("t", checkpoint(1))
    registry.publish("t", checkpoint(2))
    registry.delete_task("t")
    assert registry.tasks() == []
    for call in (registry.task, registry.pin, registry.delete_task):
        with pytest.raises(ReferenceNotFound):
            call("t")
    again = Registry(Store(root), BASE).publish("t", checkpoint(1))
    assert (again.version.number, again.alias) == (3, Alias("latest", Target.of(3), 4))


def test_unknown_names_all_look_the_same_and_leave_no_trace(registry: Registry, root: Path) -> None:
    registry.publish("t", checkpoint(1))
    calls: list[Callable[[], Any]] = [
        lambda: registry.resolve("t:2"),
        lambda: registry.resolve("t@prod"),
        lambda: registry.resolve("t@sha256:" + "0" * 64),
        lambda: registry.pin("unknown"),
        lambda: registry.pin("../t"),
        lambda: registry.task("unknown"),
        lambda: registry.version("t", 0),
        lambda: registry.read_file("t", 1, "../../log/00000001.json"),
        lambda: registry.delete_version("unknown", 1),
        lambda: registry.delete_task("../t"),
    ]
    messages = set()
    for call in calls:
        with pytest.raises(ReferenceNotFound) as caught:
            call()
        messages.add(caught.value.message)
    assert len(messages) == 1
    for name in ("../t", "T", "", "x" * 65):
        with pytest.raises(InvalidRequest):
            registry.publish(name, checkpoint(1))
    assert os.listdir(root) == ["t"]
    assert list(registry._index._snapshot.states) == ["t"]


def test_refresh_sees_what_others_wrote(registry: Registry, root: Path, reads: list[str]) -> None:
    registry.publish("t", checkpoint(1))
    other = Registry(Store(root), BASE)
    old = other.pin("t")
    registry.publish("t", checkpoint(2))
    registry.publish("u", checkpoint(3))
    registry.delete_version("t", 1)
    assert other.resolve("t").number == 1
    other.refresh()
    assert other.tasks() == registry.tasks()
    assert other.pin("t").version.number == 2
    assert (old.version.number, other.pins(old.version)) == (1, 1)
    snapshot = other._index._snapshot
    other.refresh()
    assert other._index._snapshot is snapshot
    assert reads == ["t:1", "t:2"]


def test_a_stale_reader_of_a_deleted_version_resolves_again(registry: Registry, root: Path) -> None:
    registry.publish("t", checkpoint(1))
    stale = Registry(Store(root), BASE)
    registry.publish("t", checkpoint(2))
    registry.delete_version("t", 1)
    assert registry.collect(retention=0) == ["t:1"]
    assert stale.resolve("t").number == 1
    pin = stale.pin("t")
    assert pin.version.number == 2 and torch.all(pin.prompt.tensor == 2)
    with pytest.raises(ReferenceNotFound):
        stale.pin("t:1")


def test_pins_are_counted_and_released_once(registry: Registry) -> None:
    version = registry.publish("t", checkpoint(1)).version
    pins = [registry.pin("t") for _ in range(8)]
    assert registry.pins(version) == 8
    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(lambda i: pins[i % 4].release(), range(64)):
            pass
    assert registry.pins(version) == 4
    for pin in pins:
        pin.release()
    assert registry.pins(version) == 0


def test_concurrent_first_requests_read_once_and_block_no_other_version(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = (registry.publish(task, checkpoint(i)).version for i, task in enumerate(("slow", "quick")))
    reading, go = threading.Event(), threading.Event()
    calls: list[bytes] = []

    def read(config: bytes, tensors: bytes, manifest: ManifestInput, base: BaseInfo) -> Checkpoint:
        calls.append(tensors)
        if tensors == checkpoint(0).tensors:
            reading.set()
            assert go.wait(60)
        return read_checkpoint(config, tensors, manifest, base)

    monkeypatch.setattr(files_module, "read_checkpoint", read)
    prompts: list[SoftPrompt] = []
    with ThreadPoolExecutor(64) as threads:
        waiting = [threads.submit(registry.pin, "slow") for _ in range(64)]
        try:
            assert reading.wait(60)
            assert registry.pin("quick").version == quick
            registry.publish("slow", checkpoint(2), alias="other")
        finally:
            go.set()
        prompts = [future.result(60).prompt for future in waiting]
    assert calls == [checkpoint(0).tensors, checkpoint(1).tensors]
    assert all(prompt is prompts[0] for prompt in prompts)
    assert registry.pins(slow) == 64


def test_host_memory_keeps_what_was_used_last(root: Path, reads: list[str]) -> None:
    size = checkpoint(1).prompt.num_bytes
    registry = Registry(Store(root), BASE, host_cache_bytes=2 * size)
    for content in range(1, 4):
        registry.publish("t", checkpoint(content))
    pins = [registry.pin(reference) for reference in ("t:1", "t:2", "t:1", "t:3", "t:1", "t:2")]
    assert reads == ["t:1", "t:2", "t:3", "t:2"]
    assert registry._prompts._bytes == 2 * size
    # Evicted or not, a pin has its prompt.
    assert [int(pin.prompt.tensor[0, 0]) for pin in pins] == [1, 2, 1, 3, 1, 2]
    registry.delete_version("t", 1)
    assert registry._prompts._bytes == size
    none_kept = Registry(Store(root), BASE, host_cache_bytes=0)
    assert none_kept.pin("t:2").prompt is not none_kept.pin("t:2").prompt


def test_a_pin_that_is_overtaken_by_a_deletion_leaves_nothing_in_memory(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resolved before, loaded after: its files are still there."""
    registry.publish("t", checkpoint(1), alias=None)
    registry.publish("t", checkpoint(2), alias=None)
    resolve = registry.resolve

    def resolve_and_delete(reference: str, *, user: str | None = None) -> Version:
        version = resolve(reference, user=user)
        registry.delete_version("t", 1)
        return version

    monkeypatch.setattr(registry, "resolve", resolve_and_delete)
    pin = registry.pin("t:1")
    assert torch.all(pin.prompt.tensor == 1) and registry._prompts._bytes == 0
    monkeypatch.undo()
    registry.pin("t:2").release()
    assert registry._prompts._bytes == pin.prompt.num_bytes


def test_another_base_model_lists_versions_and_says_why_they_do_not_fit(registry: Registry, root: Path) -> None:
    registry.publish("t", checkpoint(1))
    other = Registry(Store(root), replace(BASE, hidden_size=16, head_dim=16))
    assert other.tasks() == registry.tasks()
    with pytest.raises(InvalidPromptFile) as caught:
        other.pin("t")
    assert "8" in caught.value.message and "16" in caught.value.message
    assert other.pins(other.resolve("t")) == 0


def test_what_could_not_be_read_again_is_not_written(registry: Registry, root: Path) -> None:
    registry.publish("t", checkpoint(1))
    deep: dict[str, Any] = {}
    for _ in range(40):
        deep = {"deeper": deep}
    for content, actor in ((checkpoint(2, metrics=deep), "me"), (checkpoint(2), "x" * 201)):
        with pytest.raises(InvalidRequest):
            registry.publish("t", content, actor=actor)
    assert len(log_entries(root, "t")) == 1
    assert os.listdir(root / "t/versions") == ["1"]
