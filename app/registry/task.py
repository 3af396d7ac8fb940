"""What the registry holds: tasks, versions and aliases, all frozen, as the fold of a task's log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from app.errors import PromptCorrupt
from app.manifest import Manifest
from app.registry.log import DeleteTask, DeleteVersion, Entry, Head, MoveAlias, PublishVersion


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
class Alias:
    """A movable name for a version; `etag` is the sequence number of the log entry that moved it last."""

    name: str
    version: int
    etag: int


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
class TaskState:
    """A task and where its log stands; a task without versions does not exist for users, but its log does."""

    task: Task
    head: Head
    numbers: frozenset[int]  # every version number ever published: none is used again

    @classmethod
    def empty(cls, name: str) -> TaskState:
        return cls(Task(name, MappingProxyType({}), MappingProxyType({})), Head(), frozenset())

    def fold(self, entries: Iterable[Entry]) -> TaskState:
        """The state after `entries`. Raises PromptCorrupt where they do not follow from this state."""
        name, head = self.task.name, self.head
        versions, aliases, numbers = dict(self.task.versions), dict(self.task.aliases), set(self.numbers)

        def check(ok: bool, what: str) -> None:
            if not ok:
                raise PromptCorrupt(f"entry {head.seq + 1} {what}")

        for entry in entries:
            check(entry.seq == head.seq + 1 and entry.prev == head.digest, "does not follow the entry before it")
            match entry.change:
                case PublishVersion(version=number, manifest=manifest, alias=alias):
                    check(number not in numbers, "publishes a version number twice")
                    files = MappingProxyType(entry.change.files.by_name())
                    versions[number] = Version(name, number, manifest.digest, manifest, manifest.created_at, files)
                    numbers.add(number)
                    if alias is not None:
                        aliases[alias] = Alias(alias, number, entry.seq)
                case MoveAlias(alias=alias, version=number):
                    check(number in versions, "moves an alias to a version that does not exist")
                    aliases[alias] = Alias(alias, number, entry.seq)
                case DeleteVersion(version=number):
                    named = any(alias.version == number for alias in aliases.values())
                    check(number in versions and not named, "deletes a version that is absent or has an alias")
                    del versions[number]
                case DeleteTask():
                    versions, aliases = {}, {}
            head = entry.head
        task = Task(
            name,
            MappingProxyType(dict(sorted(versions.items()))),
            MappingProxyType(dict(sorted(aliases.items()))),
        )
        return TaskState(task, head, frozenset(numbers))
