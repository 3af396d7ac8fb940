"""What the registry holds: tasks, versions and aliases, all frozen, as the fold of a task's log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from app.errors import PromptCorrupt
from app.manifest import Manifest
from app.registry.alias import Alias, Target
from app.registry.log import (
    CollectVersion,
    DeleteTask,
    DeleteVersion,
    Entry,
    Head,
    MoveAlias,
    PublishVersion,
    RemoveAlias,
    RestoreVersion,
    RollBackAlias,
    SplitAlias,
)

MAX_STEPS_BACK = 64  # that an alias can be rolled back, one after the other


@dataclass(frozen=True)
class Version:
    """An immutable version of a task's soft prompt."""

    task: str
    number: int
    digest: str  # "sha256:<hex>" over the whole content, see app.checkpoint.content_digest
    manifest: Manifest = field(repr=False, hash=False)
    created_at: str  # RFC 3339, UTC
    files: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)  # name -> "sha256:<hex>"

    @property
    def reference(self) -> str:
        return f"{self.task}:{self.number}"


@dataclass(frozen=True)
class Task:
    """A name that clients select, with its live versions (by number, ascending) and aliases (by name)."""

    name: str
    versions: Mapping[int, Version]
    aliases: Mapping[str, Alias]

    @property
    def by_digest(self) -> dict[str, Version]:
        return {version.digest: version for version in self.versions.values()}


@dataclass(frozen=True)
class DeletedVersion:
    """A version that can still be restored."""

    version: Version
    deleted_at: str  # RFC 3339, UTC


@dataclass(frozen=True)
class TaskState:
    """A task and where its log stands; a task without versions does not exist for users, but its log does."""

    task: Task
    head: Head
    numbers: frozenset[int]  # every version number ever published: none is used again
    deleted: Mapping[int, DeletedVersion]

    @classmethod
    def empty(cls, name: str) -> TaskState:
        return cls(Task(name, MappingProxyType({}), MappingProxyType({})), Head(), frozenset(), MappingProxyType({}))

    def fold(self, entries: Iterable[Entry]) -> TaskState:
        """The state after `entries`. Raises PromptCorrupt where they do not follow from this state."""
        draft = _Draft(self)
        for entry in entries:
            draft.apply(entry)
        return draft.state()


class _Draft:
    """A state while entries are applied to it."""

    def __init__(self, state: TaskState) -> None:
        self._name = state.task.name
        self._head = state.head
        self._versions = dict(state.task.versions)
        self._aliases = dict(state.task.aliases)
        self._numbers = set(state.numbers)
        self._deleted = dict(state.deleted)

    def state(self) -> TaskState:
        task = Task(
            self._name,
            MappingProxyType(dict(sorted(self._versions.items()))),
            MappingProxyType(dict(sorted(self._aliases.items()))),
        )
        deleted = MappingProxyType(dict(sorted(self._deleted.items())))
        return TaskState(task, self._head, frozenset(self._numbers), deleted)

    def apply(self, entry: Entry) -> None:
        follows = entry.seq == self._head.seq + 1 and entry.prev == self._head.digest
        self._check(follows, "does not follow the entry before it")
        match entry.change:
            case PublishVersion(version=number, manifest=manifest, alias=alias):
                self._check(number not in self._numbers, "publishes a version number twice")
                files = MappingProxyType(entry.change.files.by_name())
                version = Version(self._name, number, manifest.digest, manifest, manifest.created_at, files)
                self._versions[number] = version
                self._numbers.add(number)
                if alias is not None:
                    self._move(alias, Target.of(number), entry.seq)
            case MoveAlias(alias=alias, version=number):
                self._move(alias, Target.of(number), entry.seq)
            case SplitAlias(alias=alias, weights=weights):
                self._move(alias, Target(tuple(weights)), entry.seq)
            case RollBackAlias(alias=alias, weights=weights):
                self._roll_back(alias, Target(tuple(weights)), entry.seq)
            case RemoveAlias(alias=alias):
                self._check(alias in self._aliases, "removes an alias that does not exist")
                del self._aliases[alias]
            case DeleteVersion(version=number):
                named = any(number in alias.target.numbers for alias in self._aliases.values())
                self._check(number in self._versions and not named, "deletes a version that is absent or has an alias")
                self._deleted[number] = DeletedVersion(self._versions.pop(number), entry.time)
            case RestoreVersion(version=number):
                self._check(number in self._deleted, "restores a version that is not deleted")
                self._versions[number] = self._deleted.pop(number).version
            case CollectVersion(version=number):
                self._check(number in self._deleted, "collects a version that is not deleted")
                del self._deleted[number]
            case DeleteTask():
                self._deleted |= {n: DeletedVersion(version, entry.time) for n, version in self._versions.items()}
                self._versions, self._aliases = {}, {}
        self._head = entry.head

    def _move(self, name: str, target: Target, etag: int) -> None:
        self._check(target.numbers <= self._versions.keys(), "moves an alias to a version that does not exist")
        current = self._aliases.get(name)
        previous = current.previous if current else ()
        if current and current.target != target:
            previous = (current.target, *previous)[:MAX_STEPS_BACK]
        self._aliases[name] = Alias(name, target, etag, previous)

    def _roll_back(self, name: str, target: Target, etag: int) -> None:
        current = self._aliases.get(name)
        known = current is not None and current.previous[:1] == (target,)
        self._check(known and target.numbers <= self._versions.keys(), "rolls an alias back to what it was not")
        assert current is not None
        self._aliases[name] = Alias(name, target, etag, current.previous[1:])

    def _check(self, ok: bool, what: str) -> None:
        if not ok:
            raise PromptCorrupt(f"entry {self._head.seq + 1} {what}")
