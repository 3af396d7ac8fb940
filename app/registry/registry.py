"""The registry: references resolved and pinned, versions published, aliases moved, all of it over one store.

Reads of names and metadata take no lock and touch no file. Calls that write or load block: make them from a
worker thread. Unknown and malformed names raise ReferenceNotFound everywhere, a task whose log is damaged
PromptCorrupt, and a failing file system NotReady or StorageFull.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from app.checkpoint import CONFIG_FILE, MANIFEST_FILE, TENSORS_FILE, Checkpoint
from app.errors import InvalidRequest, PromptCorrupt, ReferenceNotFound, ServerError
from app.manifest import Manifest
from app.registry import changes, log
from app.registry.alias import Alias, Target
from app.registry.cleaner import Cleaner
from app.registry.files import Files
from app.registry.index import Index
from app.registry.log import Change, Entry, MoveAlias, PublishVersion
from app.registry.pin import Pin, PinCount
from app.registry.prompt_cache import Key, PromptCache
from app.registry.quarantine import Quarantine
from app.registry.reference import (
    DEFAULT_ALIAS,
    check_alias_name,
    check_task_name,
    not_found,
    parse_reference,
)
from app.registry.store import GRACE, Store, Upload
from app.registry.task import DeletedVersion, Task, TaskState, Version
from app.soft_prompt import BaseInfo, SoftPrompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """What `publish` did. `created` is False when the task had the same content already."""

    version: Version
    created: bool
    warnings: tuple[str, ...]
    alias: Alias | None  # where the alias that was asked for stands now


class Registry:
    """The registry of one process, over a store that others may share. Thread-safe."""

    def __init__(self, store: Store, base: BaseInfo, *, host_cache_bytes: int = 1 << 30) -> None:
        """Read every log, and no tensor. `host_cache_bytes` bounds the tensors that are kept unpinned."""
        self._store = store
        self._base = base
        self._pins = PinCount()
        self._prompts = PromptCache(host_cache_bytes)
        self._quarantine = Quarantine()
        self._unrefreshed: str | None = None  # why the last refresh failed
        self._index = Index(store, on_gone=self._forget)
        self._cleaner = Cleaner(store, self._index, self._pins)
        self._files = Files(store, self._index, self._quarantine, base)

    @property
    def num_swaps(self) -> int:
        """Times an alias changed from one version, or one split, to another, since this registry was opened."""
        return self._index.num_swaps

    def tasks(self) -> list[Task]:
        """Tasks that have a version, by name."""
        return self._index.tasks()

    def task(self, name: str) -> Task:
        return self._index.task(name)

    def version(self, task: str, number: int) -> Version:
        return _version(self.task(task), number)

    def resolve(self, reference: str, *, user: str | None = None) -> Version:
        """The version that `reference` (see app.registry.reference) names now.

        Of an alias that stands for several, one by weight; for a `user` always the same.
        """
        wanted = parse_reference(reference)
        task = self.task(wanted.task)
        if wanted.digest is not None:
            version = task.by_digest.get(wanted.digest)
            return _version(task, version.number if version else None)
        if wanted.alias is not None:
            alias = task.aliases.get(wanted.alias)
            return _version(task, alias.choose(task.name, user) if alias else None)
        return _version(task, wanted.version)

    def pin(self, reference: str, *, user: str | None = None, drawn: Version | None = None) -> Pin:
        """Resolve `reference` once, as `resolve` does, count its version as used and have its soft prompt in memory.

        `drawn` is what it was resolved to already: of a canary, another draw could give another version. Blocks when
        files have to be read. The caller releases the pin. Raises PromptCorrupt if the files do not match their
        digests, and InvalidPromptFile if the prompt does not fit the base model, which the operator may have changed
        since it was published.
        """
        while True:
            version, drawn = drawn or self.resolve(reference, user=user), None
            self._pins.add(version)
            try:
                return Pin(version, self._prompt(version), self._pins)
            except ReferenceNotFound:
                # Deleted since it was resolved; the index knows by now: the name has moved on, or is gone.
                self._pins.remove(version)
            except BaseException:
                self._pins.remove(version)
                raise

    def pin_in_memory(self, version: Version) -> Pin | None:
        """Pin what was resolved just now if its soft prompt is in memory; takes no time."""
        self._pins.add(version)
        prompt = self._prompts.find(_key(version))
        if prompt is None:
            self._pins.remove(version)
            return None
        return Pin(version, prompt, self._pins)

    def read_prompt(self, version: Version) -> SoftPrompt:
        """Its soft prompt for a look, which changes nothing of what is kept in memory. Raises what `pin` raises."""
        return self._prompts.find(_key(version), use=False) or self._files.load(version)

    def pins(self, version: Version) -> int:
        """How many pins of the version are not released."""
        return self._pins[version]

    def publish(
        self,
        task: str,
        checkpoint: Checkpoint,
        *,
        alias: str | None = DEFAULT_ALIAS,
        actor: str = "anonymous",
    ) -> Published:
        """Store the checkpoint as a new version and move `alias` to it, both or neither; durable on return.

        Content that a live version of the task has already is not stored again, unless its files are damaged;
        the alias moves to that one. Raises InvalidRequest for a bad name, the base model's own included.
        """
        check_task_name(task)
        if task == self._base.name:
            raise InvalidRequest("this name is the base model's", param="task")
        if alias is not None:
            check_alias_name(alias)
        digest = checkpoint.prompt.digest
        manifest = _manifest(checkpoint)
        files = {
            CONFIG_FILE: checkpoint.config,
            TENSORS_FILE: checkpoint.tensors,
            MANIFEST_FILE: log.to_json(manifest.model_dump(mode="json"), indent=2),
        }
        hashes = log.Files.of(files)
        upload = self._store.upload(task, files)
        damaged: Version | None = None

        def decide(state: TaskState) -> Change | None:
            existing = state.task.by_digest.get(digest)
            if existing is None or existing == damaged:
                number = upload.place(state.numbers)
                return PublishVersion(version=number, files=hashes, manifest=manifest, alias=alias)
            current = state.task.aliases.get(alias) if alias else None
            if alias is None or (current and current.target == Target.of(existing.number)):
                return None
            return MoveAlias(alias=alias, version=existing.number)

        try:
            known = self._index.catch_up(task)
            existing = known.task.by_digest.get(digest)
            if existing is not None and not self._files.are_intact(existing):
                damaged = existing  # uploading it again is how an operator mends it
            if existing is None or damaged:
                if not known.head.seq:
                    self._store.create(task)
                upload.write()  # the slow part, before the commit for which other writers wait
            published = self._index.commit(task, decide, actor).task
        finally:
            self._discard_unless_published(task, upload)
        version = published.by_digest[digest]
        return Published(
            version=version,
            created=version.number == upload.number,
            warnings=checkpoint.warnings,
            alias=published.aliases[alias] if alias else None,
        )

    def move_alias(
        self,
        task: str,
        alias: str,
        versions: int | Mapping[int, float],
        *,
        expected: changes.Etags | None,
        actor: str = "anonymous",
    ) -> Alias:
        """Point `alias` at a version, or at several by weight, if its etag is still `expected` (None: if it is new).

        Compared with what every process has acknowledged by then, which `task` may not show yet. Raises
        PreconditionFailed if it differs, and InvalidRequest for a bad name or bad weights.
        """
        check_alias_name(alias)
        target = Target.of(versions)

        def decide(state: TaskState) -> Change:
            return changes.move_alias(state, alias, target, expected)

        return self._index.commit(task, decide, actor).task.aliases[alias]

    def roll_back_alias(self, task: str, alias: str, *, expected: changes.Etags, actor: str = "anonymous") -> Alias:
        """Point `alias` at what it was before its last move; again for what it was before that.

        Raises PreconditionFailed if it was moved since, or if there is nothing to go back to, and ReferenceNotFound if
        there is no such alias.
        """
        state = self._index.commit(task, lambda state: changes.roll_back_alias(state, alias, expected), actor)
        return state.task.aliases[alias]

    def remove_alias(self, task: str, alias: str, *, expected: changes.Etags, actor: str = "anonymous") -> None:
        """Raises PreconditionFailed if it was moved since, and ReferenceNotFound if it is gone."""
        self._index.commit(task, lambda state: changes.remove_alias(state, alias, expected), actor)

    def delete_version(self, task: str, number: int, *, actor: str = "anonymous") -> Version:
        """Delete a version: nobody finds it any more, who has it pinned keeps it, and `restore_version` undoes it.

        Raises PreconditionFailed while an alias names it.
        """
        state = self._index.commit(task, lambda state: changes.delete_version(state, number), actor)
        return state.deleted[number].version

    def delete_task(self, task: str, *, actor: str = "anonymous") -> list[Version]:
        """Delete every version of a task, and its alias `latest` with them; return those that were live until now.

        Raises PreconditionFailed while it has any other alias.
        """
        live: list[Version] = []

        def decide(state: TaskState) -> Change:
            live[:] = state.task.versions.values()
            return changes.delete_task(state)

        self._index.commit(task, decide, actor)
        return live

    def restore_version(self, task: str, number: int, *, actor: str = "anonymous") -> Version:
        """Undo the deletion of a version whose files have not been collected; it gets no alias back."""
        state = self._index.commit(task, lambda state: changes.restore_version(state, number), actor)
        return state.task.versions[number]

    def deleted_versions(self, task: str) -> list[DeletedVersion]:
        """Versions that can be restored, by number, of a task that need not have others."""
        return list(self._index.state(task).deleted.values())

    def collect(self, *, retention: float) -> list[str]:
        """Remove the files of versions that were deleted more than `retention` seconds ago, and return their names.

        A version that a request of this process still uses is left for the next time. Logs and goes on with the next
        task where that fails.
        """
        return self._cleaner.collect(retention)

    def history(self, task: str, *, before: int | None, limit: int) -> list[Entry]:
        """Up to `limit` entries of the task's log, the newest first, of those below sequence number `before`."""
        last = self._index.state(task).head.seq
        newest = last if before is None else min(before - 1, last)
        return [self._store.read_entry(task, seq) for seq in range(newest, max(0, newest - limit), -1)]

    def read_file(self, task: str, number: int, name: str) -> bytes:
        """One of `Version.files`, as it was published; PromptCorrupt if it no longer matches its digest."""
        version = self.version(task, number)
        if name not in version.files:
            raise not_found()
        return self._files.read(version, name)

    def refresh(self) -> None:
        """Pick up what other processes wrote; cheap when there is nothing.

        Never raises for a failing file system: what is in memory is served on, and the trouble is logged.
        """
        try:
            self._index.refresh()
        except ServerError as error:
            self._unrefreshed = error.message
            logger.warning("the registry could not be refreshed: %s", error.message)
        else:
            self._unrefreshed = None

    def trouble(self) -> str | None:
        """What an operator should look at, without names; None if all is well."""
        found = [] if self._unrefreshed is None else [f"not refreshed: {self._unrefreshed}"]
        damaged = len(self._index.problems())
        if damaged:
            found.append(f"{damaged} task{'s' * (damaged > 1)} whose log cannot be used")
        return "; ".join(found) or None

    def sweep(self, *, grace: float = GRACE, retention: float = 0.0) -> int:
        """Remove what uploads and writers that died left longer than `grace` seconds ago; return how much.

        What looks like a version, but for its entry in the log, stays until this registry has seen it like that for
        `retention` seconds: the entry may have been lost. Where there is no log at all it stays for good. Logs and goes
        on where that fails, and leaves a task alone whose log cannot be read.
        """
        return self._cleaner.sweep(grace, retention)

    def _discard_unless_published(self, task: str, upload: Upload) -> None:
        # An append that failed half-way may be there, and seen by others: only the log can tell.
        try:
            if upload.number not in self._index.catch_up(task).numbers:
                upload.discard()
        except ServerError as error:
            logger.warning("an upload for %s may be left over: %s", task, error.message)

    def _prompt(self, version: Version) -> SoftPrompt:
        prompt = self._prompts.get(_key(version), partial(self._files.load, version))
        try:
            self.version(version.task, version.number)
        except (ReferenceNotFound, PromptCorrupt):
            # Deleted since it was resolved, and forgotten before it was loaded: nobody else would ever drop it.
            self._prompts.forget(_key(version))
        return prompt

    def _forget(self, version: Version) -> None:
        self._prompts.forget(_key(version))
        self._quarantine.lift(version, *version.files)


def _key(version: Version) -> Key:
    return version.task, version.number, version.digest


def _version(task: Task, number: int | None) -> Version:
    version = None if number is None else task.versions.get(number)
    if version is None:
        raise not_found()
    return version


def _manifest(checkpoint: Checkpoint) -> Manifest:
    return Manifest(
        **checkpoint.manifest.model_dump(),
        digest=checkpoint.prompt.digest,
        created_at=log.now(),
        peft_type=checkpoint.peft_type,
        num_virtual_tokens=checkpoint.prompt.num_virtual_tokens,
        size_bytes=len(checkpoint.tensors),
    )
