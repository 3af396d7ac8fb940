"""A registry's life in steps that can be cut off anywhere, and what a user can tell of the state between them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from app.registry import Registry, Store, Version
from app.registry.durable import FileSystem
from app.registry.log import sha256
from tests.checkpoints import BASE, checkpoint
from tests.interposed_files import Interposed

# task -> digests of versions, alias -> digest, digest of a version that can be restored -> whether its files are there
State = dict[str, tuple[frozenset[str], dict[str, str], dict[str, bool]]]

content = cache(checkpoint)


@dataclass(frozen=True)
class Step:
    name: str
    run: Callable[[Registry], object]
    again: bool = True  # whether it may be done twice
    quiet: bool = False  # whether it logs its failures, and so says nothing by returning


def _move(registry: Registry) -> None:
    task = registry.task("t")
    number = task.by_digest[content(2).prompt.digest].number
    registry.move_alias("t", "latest", number, expected=task.aliases["latest"].etag)


def _delete(registry: Registry) -> None:
    registry.delete_version("t", registry.task("t").by_digest[content(1).prompt.digest].number)


def _roll_back(registry: Registry) -> None:
    registry.roll_back_alias("t", "prod", expected=registry.task("t").aliases["prod"].etag)


def _remove_alias(registry: Registry) -> None:
    registry.remove_alias("t", "prod", expected=registry.task("t").aliases["prod"].etag)


def _restore(registry: Registry) -> None:
    [deleted] = registry.deleted_versions("t")
    registry.restore_version("t", deleted.version.number)


STEPS = (
    Step("publish-first", lambda registry: registry.publish("t", content(1))),
    Step("publish-next", lambda registry: registry.publish("t", content(2), alias=None)),
    Step("publish-with-alias", lambda registry: registry.publish("t", content(3), alias="prod")),
    Step("move-alias", _move, again=False),
    Step("publish-same", lambda registry: registry.publish("t", content(2), alias="prod")),
    Step("roll-back-alias", _roll_back, again=False),
    Step("remove-alias", _remove_alias, again=False),
    Step("delete-version", _delete, again=False),
    Step("restore-version", _restore, again=False),
    Step("delete-restored", _delete, again=False),
    Step("collect", lambda registry: registry.collect(retention=0), again=False, quiet=True),
    Step("publish-other", lambda registry: registry.publish("u", content(4))),
    Step("delete-task", lambda registry: registry.delete_task("u"), again=False),
    Step("sweep", lambda registry: registry.sweep(grace=-1e9), quiet=True),
)


def open_registry(root: Path, fs: FileSystem | None = None) -> Registry:
    return Registry(Store(root, fs or Interposed()), BASE)


def describe(registry: Registry) -> State:
    """Without numbers, which a retry may skip."""
    found: State = {}
    for state in registry._index.states():
        task = state.task
        digests = {number: version.digest for number, version in task.versions.items()}
        aliases = {alias.name: digests[alias.version] for alias in task.aliases.values()}
        deleted = {item.version.digest: _is_whole(registry, item.version) for item in state.deleted.values()}
        if digests or deleted:
            found[task.name] = (frozenset(digests.values()), aliases, deleted)
    return found


def _is_whole(registry: Registry, version: Version) -> bool:
    """Whether the files are what was published, past the file system that the test has made to fail."""
    folder = registry._store._versions(version.task) / str(version.number)
    found = {name: sha256((folder / name).read_bytes()) for name in version.files if (folder / name).exists()}
    return found == version.files


def recover(root: Path) -> Registry:
    """A registry that starts on what a crash left; everything it lists must be whole."""
    started = time.monotonic()
    registry = open_registry(root)
    assert time.monotonic() - started < 2
    check_whole(registry)
    return registry


def check_whole(registry: Registry) -> None:
    assert not registry._index._snapshot.problems
    for state in registry._index.states():
        for version in state.task.versions.values():
            for name in version.files:
                registry.read_file(version.task, version.number, name)
            registry.pin(version.reference).release()
        for deleted in state.deleted.values():
            assert _is_whole(registry, deleted.version), f"{deleted.version.reference} could not be restored"


def retry(step: Step, registry: Registry, before: State) -> bool:
    """Whether there was anything to do."""
    wanted = step.again or describe(registry) == before
    if wanted:
        step.run(registry)
    return wanted


def leftovers(root: Path) -> list[str]:
    """What the log does not want; files of deleted versions are wanted until they are collected.

    Where there is no log, it is nobody's to say what looks like a version.
    """
    found = []
    registry = open_registry(root)
    for task in registry._store.tasks():
        state = registry._index.catch_up(task)
        found += [f"{task}/{path.parent.name}/{path.name}" for path in (root / task).glob("*/.tmp-*")]
        if state.head.seq:
            unwanted = registry._store.numbers(task) - state.task.versions.keys() - state.deleted.keys()
            found += [f"{task}/versions/{number}" for number in unwanted]
    return found


def leave_leftovers(root: Path, task: str) -> None:
    """As writers that died at every step would."""
    versions = root / task / "versions"
    for name in (".tmp-0123", "77"):
        (versions / name).mkdir()
        for file in ("adapter_config.json", "manifest.json"):
            (versions / name / file).write_bytes(b"{}")
    (versions / "78").mkdir()
    (root / task / "log/.tmp-0123").write_bytes(b'{"seq": 2')


def build_states(folder: Path) -> tuple[list[State], Callable[[int, Path], None]]:
    """The state before each step and after the last, and a function that makes the folder as it is before one."""
    root = folder / "live"
    states: list[State] = [{}]
    for position, step in enumerate(STEPS):
        if step.name == "sweep":
            leave_leftovers(root, "t")
        if root.exists():
            shutil.copytree(root, folder / f"before-{position}")
        registry = open_registry(root)
        step.run(registry)
        states.append(describe(registry))

    def make(position: int, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        if (folder / f"before-{position}").exists():
            shutil.copytree(folder / f"before-{position}", target)

    return states, make
