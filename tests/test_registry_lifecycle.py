"""What happens to versions and aliases over time: canaries, rolling back, deleting, restoring, collecting, history."""

from __future__ import annotations

import gc
import os
import random
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.errors import InvalidRequest, PreconditionFailed, PromptCorrupt, ReferenceNotFound
from app.registry import Registry, Store, Target, log
from app.registry import alias as alias_module
from app.registry.store import Store as StoreClass
from tests.checkpoints import BASE, TENSORS_FILE, checkpoint

DAY = 86_400.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "prompts"


@pytest.fixture
def registry(root: Path) -> Registry:
    registry = Registry(Store(root), BASE)
    for content in (1, 2, 3):
        registry.publish("t", checkpoint(content), alias=None)
    return registry


def move(registry: Registry, versions: Any, alias: str = "prod") -> int:
    current = registry.task("t").aliases.get(alias)
    return registry.move_alias("t", alias, versions, expected=current.etag if current else None).etag


def etag(registry: Registry, alias: str = "prod") -> int:
    return registry.task("t").aliases[alias].etag


# ---- Canaries ----


def test_a_canary_splits_by_weight(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alias_module.random, "random", random.Random(0).random)
    move(registry, {1: 9, 2: 0.5, 3: 0.5})
    alias = registry.task("t").aliases["prod"]
    assert alias.target.weights == ((1, 0.9), (2, 0.05), (3, 0.05)) and alias.version == 1
    drawn = Counter(registry.resolve("t@prod").number for _ in range(20_000))
    for number, share in alias.target.weights:
        assert abs(drawn[number] / 20_000 - share) < 4 * (share * (1 - share) / 20_000) ** 0.5
    pin = registry.pin("t@prod", user="ann")
    assert pin.prompt.digest == pin.version.digest == registry.resolve("t@prod", user="ann").digest


def test_a_user_stays_with_a_version_and_never_moves_back(registry: Registry) -> None:
    users = [f"user-{i}" for i in range(2_000)]

    def chosen() -> list[int]:
        return [registry.resolve("t@prod", user=user).number for user in users]

    move(registry, 1)
    before = chosen()
    for share in (0.01, 0.1, 0.5, 0.9):
        move(registry, {1: 1 - share, 3: share})
        after = chosen()
        assert after == chosen() == [Registry(Store(registry._store._root), BASE).resolve("t@prod", user=u).number
                                     for u in users[:20]] + after[20:]  # fmt: skip
        assert all(new >= old for old, new in zip(before, after, strict=True))
        assert abs(after.count(3) / len(users) - share) < 4 * (share * (1 - share) / len(users)) ** 0.5
        before = after
    # Who is early in one canary must not be early in every other.
    registry.publish("u", checkpoint(1), alias=None)
    registry.publish("u", checkpoint(2), alias=None)
    registry.move_alias("u", "prod", {1: 1, 2: 1}, expected=None)
    move(registry, {1: 1, 2: 1})
    both = sum(
        registry.resolve("u@prod", user=user).number == number for user, number in zip(users, chosen(), strict=True)
    )
    assert 850 < both < 1150


def test_a_split_of_one_is_a_plain_alias(registry: Registry) -> None:
    move(registry, {2: 17.5})
    assert registry.task("t").aliases["prod"].target == Target.of(2)
    assert registry.history("t", before=None, limit=1)[0].op == "alias"


def test_what_a_canary_names_is_not_deleted_and_publishing_ends_it(registry: Registry) -> None:
    move(registry, {1: 0.5, 3: 0.5}, "latest")
    for number in (1, 3):
        with pytest.raises(PreconditionFailed, match="latest"):
            registry.delete_version("t", number)
    registry.publish("t", checkpoint(1))  # known content: the alias goes to it whole
    assert registry.task("t").aliases["latest"].target == Target.of(1)
    registry.delete_version("t", 3)


@pytest.mark.parametrize(
    "weights", [{}, {1: 0.0}, {1: -1.0, 2: 2.0}, {1: float("nan")}, {1: float("inf")}, dict.fromkeys(range(1, 18), 1.0)]
)
def test_weights_that_say_nothing(registry: Registry, weights: dict[int, float]) -> None:
    with pytest.raises(InvalidRequest, match="weights"):
        move(registry, weights)
    with pytest.raises(ReferenceNotFound):
        move(registry, {1: 0.5, 9: 0.5})


# ---- Rolling back ----


def test_rolling_back_goes_a_step_further_each_time(registry: Registry, root: Path) -> None:
    for versions in (1, {1: 0.9, 2: 0.1}, 2, 2, 3):
        move(registry, versions)
    registry.publish("t", checkpoint(4), alias="prod")
    back = [registry.roll_back_alias("t", "prod", expected=etag(registry)).target.numbers for _ in range(4)]
    assert back == [{3}, {2}, {1, 2}, {1}]
    with pytest.raises(PreconditionFailed, match="not been anything else"):
        registry.roll_back_alias("t", "prod", expected=etag(registry))
    move(registry, 3)
    again = Registry(Store(root), BASE)
    assert again.roll_back_alias("t", "prod", expected=etag(again)).version == 1


def test_rolling_back_is_compare_and_swap(registry: Registry) -> None:
    stale = move(registry, 1)
    move(registry, 2)
    for expected in (stale, 99):
        with pytest.raises(PreconditionFailed, match="moved since"):
            registry.roll_back_alias("t", "prod", expected=expected)
    with pytest.raises(ReferenceNotFound):
        registry.roll_back_alias("t", "nope", expected=1)
    assert registry.task("t").aliases["prod"].version == 2


def test_rolling_back_to_what_was_deleted(registry: Registry) -> None:
    move(registry, 1)
    move(registry, 2)
    registry.delete_version("t", 1)
    with pytest.raises(PreconditionFailed, match="version 1.*restore it first"):
        registry.roll_back_alias("t", "prod", expected=etag(registry))
    registry.restore_version("t", 1)
    assert registry.roll_back_alias("t", "prod", expected=etag(registry)).version == 1
    move(registry, 2)
    registry.delete_version("t", 1)
    registry.collect(retention=0)
    with pytest.raises(PreconditionFailed, match="files are gone"):
        registry.roll_back_alias("t", "prod", expected=etag(registry))


def test_an_alias_is_removed_by_compare_and_swap(registry: Registry) -> None:
    stale = move(registry, 1)
    current = move(registry, 2)
    with pytest.raises(PreconditionFailed):
        registry.remove_alias("t", "prod", expected=stale)
    registry.remove_alias("t", "prod", expected=current)
    with pytest.raises(ReferenceNotFound):
        registry.resolve("t@prod")
    registry.delete_version("t", 2)
    with pytest.raises(ReferenceNotFound):
        registry.remove_alias("t", "prod", expected=current)
    assert move(registry, 1) > current  # its old etag is not one again


# ---- Deleting, restoring, collecting ----


def test_a_deleted_version_can_be_restored_until_it_is_collected(registry: Registry, root: Path) -> None:
    registry.delete_version("t", 2)
    [deleted] = registry.deleted_versions("t")
    assert deleted.version.number == 2
    for reference in ("t:2", f"t@{deleted.version.digest}"):
        with pytest.raises(ReferenceNotFound):
            registry.pin(reference)
    assert Registry(Store(root), BASE).restore_version("t", 2) == deleted.version
    registry.refresh()
    pin = registry.pin("t:2")
    assert torch.all(pin.prompt.tensor == 2)
    pin.release()
    registry.delete_version("t", 2)
    assert registry.collect(retention=DAY) == [] and (root / "t/versions/2").is_dir()
    assert registry.collect(retention=0) == ["t:2"] and not (root / "t/versions/2").exists()
    for again in (registry, Registry(Store(root), BASE)):
        assert again.deleted_versions("t") == []
        with pytest.raises(ReferenceNotFound):
            again.restore_version("t", 2)
    assert registry.publish("t", checkpoint(2)).version.number == 4
    assert registry.collect(retention=0) == []


def test_a_deleted_task_comes_back_version_by_version(registry: Registry) -> None:
    registry.publish("t", checkpoint(3))
    registry.delete_task("t")
    assert [item.version.number for item in registry.deleted_versions("t")] == [1, 2, 3]
    registry.restore_version("t", 3)
    assert list(registry.task("t").versions) == [3] and not registry.task("t").aliases
    registry.collect(retention=0)
    assert registry.deleted_versions("t") == [] and torch.all(registry.pin("t:3").prompt.tensor == 3)
    with pytest.raises(ReferenceNotFound):
        registry.deleted_versions("unknown")


def test_what_is_pinned_is_not_collected(registry: Registry, root: Path) -> None:
    pin = registry.pin("t:2")
    registry.delete_version("t", 2)
    registry.delete_version("t", 3)
    assert registry.collect(retention=0) == ["t:3"] and sorted(os.listdir(root / "t/versions")) == ["1", "2"]
    assert torch.all(pin.prompt.tensor == 2)
    pin.release()
    assert registry.collect(retention=0) == ["t:2"] and os.listdir(root / "t/versions") == ["1"]


def test_memory_goes_with_the_last_pin(registry: Registry) -> None:
    first, second = registry.pin("t:2"), registry.pin("t:2")
    prompt = weakref.ref(first.prompt)
    registry.delete_version("t", 2)
    first.release()
    del first
    gc.collect()
    assert prompt() is second.prompt
    second.release()
    del second
    gc.collect()
    assert prompt() is None


def test_the_log_says_that_files_go_before_they_do(
    registry: Registry, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever restores a version at the same moment either gets it with its files or is refused."""
    registry.delete_version("t", 2)
    other = Registry(Store(root), BASE)

    def refused(_: StoreClass, task: str, number: int) -> None:
        with pytest.raises(ReferenceNotFound):
            other.restore_version(task, number)

    monkeypatch.setattr(StoreClass, "remove_version", refused)
    assert registry.collect(retention=0) == ["t:2"]
    registry.delete_version("t", 3)
    late = Registry(Store(root), BASE)
    registry.restore_version("t", 3)
    assert late.collect(retention=0) == [], "its knowledge was old; the log's is not"
    assert torch.all(late.pin("t:3").prompt.tensor == 3)


def test_history_is_newest_first_and_paged(registry: Registry) -> None:
    move(registry, 1)
    registry.move_alias("t", "prod", {1: 1, 2: 1}, expected=etag(registry), actor="ann")
    registry.roll_back_alias("t", "prod", expected=etag(registry), actor="bob")
    registry.remove_alias("t", "prod", expected=etag(registry))
    registry.delete_version("t", 3)
    registry.restore_version("t", 3)
    registry.delete_version("t", 3)
    registry.collect(retention=0)
    entries = registry.history("t", before=None, limit=100)
    assert [entry.op for entry in entries] == [
        *("collect_version", "delete_version", "restore_version", "delete_version", "remove_alias", "roll_back_alias"),
        *("split_alias", "alias", "publish", "publish", "publish"),
    ]
    assert [entry.seq for entry in entries] == list(range(11, 0, -1))
    assert (entries[5].actor, entries[6].actor, entries[0].actor) == ("bob", "ann", "collector")
    pages = [registry.history("t", before=before, limit=4) for before in (None, 8, 4)]
    assert [entry for page in pages for entry in page] == entries
    assert registry.history("t", before=1, limit=4) == [] and registry.history("t", before=99, limit=1) == entries[:1]
    with pytest.raises(ReferenceNotFound):
        registry.history("unknown", before=None, limit=1)


@pytest.mark.parametrize(
    "change",
    [
        log.DeleteVersion(version=3),  # the canary names it, if not first
        log.DeleteVersion(version=9),
        log.RestoreVersion(version=1),
        log.CollectVersion(version=1),
        log.MoveAlias(alias="prod", version=9),
        log.SplitAlias(alias="prod", weights=[(1, 0.5), (9, 0.5)]),
        log.RollBackAlias(alias="prod", weights=[(2, 1.0)]),
        log.RollBackAlias(alias="new", weights=[(1, 1.0)]),
        log.RemoveAlias(alias="new"),
    ],
    ids=repr,
)
def test_a_log_that_says_the_impossible_is_damaged(registry: Registry, change: log.Change) -> None:
    move(registry, 1)
    move(registry, {1: 0.9, 3: 0.1})
    state = registry._index.state("t")
    with pytest.raises(PromptCorrupt, match="entry 6"):
        state.fold([log.Entry.after(state.head, change, "nobody")])


# ---- Everything, in any order ----


class Lifecycle(RuleBasedStateMachine):
    """Random operations against a plain model; after each, a registry that reads the files anew says the same."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)
        self.registry = Registry(Store(self.root), BASE)
        self.content: dict[int, int] = {}  # of live versions
        self.deleted: dict[int, int] = {}
        self.aliases: dict[str, list[frozenset[int]]] = {}  # name -> what it was, and is, in the end
        self.last = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    def _live(self, data: Any) -> int:
        return data.draw(st.sampled_from(sorted(self.content)))

    @rule(content=st.integers(1, 6), alias=st.sampled_from(["latest", "prod", None]))
    def publish(self, content: int, alias: str | None) -> None:
        published = self.registry.publish("t", checkpoint(content), alias=alias)
        known = [number for number, value in self.content.items() if value == content]
        if known:
            assert not published.created and published.version.number == known[0]
        else:
            self.last += 1
            assert published.created and published.version.number == self.last
            self.content[self.last] = content
        if alias:
            self._push(alias, frozenset([published.version.number]))

    @precondition(lambda self: self.content)
    @rule(alias=st.sampled_from(["latest", "prod", "canary"]), data=st.data())
    def move(self, alias: str, data: Any) -> None:
        numbers = data.draw(st.sets(st.sampled_from(sorted(self.content)), min_size=1, max_size=3))
        current = self.registry.task("t").aliases.get(alias)
        expected = current.etag if current else None
        wrong = 10_000 if expected is None else data.draw(st.sampled_from([None, expected - 1]))
        with pytest.raises(PreconditionFailed):
            self.registry.move_alias("t", alias, dict.fromkeys(numbers, 1.0), expected=wrong)
        self.registry.move_alias("t", alias, dict.fromkeys(numbers, 1.0), expected=expected)
        self._push(alias, frozenset(numbers))

    @precondition(lambda self: self.aliases)
    @rule(data=st.data())
    def roll_back(self, data: Any) -> None:
        alias = data.draw(st.sampled_from(sorted(self.aliases)))
        past = self.aliases[alias]
        expected = self.registry.task("t").aliases[alias].etag
        if len(past) == 1 or not past[-2] <= self.content.keys():
            with pytest.raises(PreconditionFailed):
                self.registry.roll_back_alias("t", alias, expected=expected)
        else:
            self.registry.roll_back_alias("t", alias, expected=expected)
            past.pop()

    @precondition(lambda self: self.aliases)
    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        alias = data.draw(st.sampled_from(sorted(self.aliases)))
        self.registry.remove_alias("t", alias, expected=self.registry.task("t").aliases[alias].etag)
        del self.aliases[alias]

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        number = self._live(data)
        if any(number in past[-1] for past in self.aliases.values()):
            with pytest.raises(PreconditionFailed):
                self.registry.delete_version("t", number)
        else:
            self.registry.delete_version("t", number)
            self.deleted[number] = self.content.pop(number)

    @precondition(lambda self: self.deleted)
    @rule(data=st.data())
    def restore(self, data: Any) -> None:
        number = data.draw(st.sampled_from(sorted(self.deleted)))
        self.registry.restore_version("t", number)
        self.content[number] = self.deleted.pop(number)

    @precondition(lambda self: self.content and set(self.aliases) <= {"latest"})
    @rule()
    def delete_task(self) -> None:
        self.registry.delete_task("t")
        self.deleted |= self.content
        self.content, self.aliases = {}, {}

    @rule()
    def collect(self) -> None:
        assert self.registry.collect(retention=0) == [f"t:{number}" for number in sorted(self.deleted)]
        self.deleted = {}

    def _push(self, alias: str, numbers: frozenset[int]) -> None:
        past = self.aliases.setdefault(alias, [])
        if not past or past[-1] != numbers:
            past.append(numbers)

    @invariant()
    def the_files_say_the_same(self) -> None:
        for registry in (self.registry, Registry(Store(self.root), BASE)):
            [task] = registry.tasks() or [None]
            assert (task is None) == (not self.content)
            if task is not None:
                assert list(task.versions) == sorted(self.content)
                assert {name: alias.target.numbers for name, alias in task.aliases.items()} == {
                    name: past[-1] for name, past in self.aliases.items()
                }
            if self.last:
                assert [item.version.number for item in registry.deleted_versions("t")] == sorted(self.deleted)
        for number, content in self.content.items():
            data = self.registry.read_file("t", number, TENSORS_FILE)
            assert data == checkpoint(content).tensors


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(max_examples=20, stateful_step_count=25, deadline=None, derandomize=True)
