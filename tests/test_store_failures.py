"""Each call of the store to the file system fails once or for good: nothing is lost, and a retry succeeds."""

from __future__ import annotations

import ast
import errno
import itertools
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from app.errors import NotReady, StorageFull
from app.registry import Registry, durable
from app.registry.durable import FileSystem
from tests.interposed_files import CALLS, COMPOSED, Failing, Interposed
from tests.registry_steps import (
    STEPS,
    State,
    build_states,
    content,
    describe,
    leftovers,
    open_registry,
    recover,
    retry,
)

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE, errno.EINTR)
SHORT = 0
REGISTRY = Path(durable.__file__).parent


def test_the_store_has_no_other_way_to_its_files() -> None:
    public = {name for name in vars(FileSystem) if not name.startswith("_")}
    assert public == {*CALLS, *COMPOSED}
    for path in REGISTRY.glob("*.py"):
        if path.name == "durable.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"os", "shutil", "io", "tempfile"}, path
            if isinstance(node, ast.Name):
                assert node.id != "open", path


def ways(at: int, every: bool) -> list[tuple[int, bool, bool]]:
    """How call `at` fails, as (errno, lasting, late): some in turn, or all."""
    numbers = ERRORS if every else (ERRORS[at % len(ERRORS)],)
    lastings = (False, True) if every else ((at + at // len(ERRORS)) % 2 == 1,)
    found = [(number, lasting, False) for number in numbers for lasting in lastings]
    return [*found, (errno.EIO, False, True), *([(SHORT, True, False)] if every or at == 1 else [])]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)], ids=["some", "all"])
@pytest.mark.parametrize("position", range(len(STEPS)), ids=[step.name for step in STEPS])
def test_every_call_fails(memory_path: Path, position: int, every: bool) -> None:
    step, root = STEPS[position], memory_path / "prompts"
    states, make = build_states(memory_path)
    before, after = states[position], states[position + 1]
    raised = 0
    for at in itertools.count(1):
        for number, lasting, late in ways(at, every):
            make(position, root)
            fs = Failing()
            registry = open_registry(root, fs)
            fs.fail(number, at=at, lasting=lasting, late=late)
            error: Exception | None = None
            try:
                step.run(registry)
            except (StorageFull, NotReady) as caught:
                error = caught
            reached = bool(fs.failed)
            acknowledged = error is None and not (step.quiet and reached)
            check_outcome(registry, fs, error, number, (before, after), acknowledged, root)
            raised += error is not None
            retry(step, registry, before)
            registry.sweep(grace=-1e9)
            assert leftovers(root) == []
            assert describe(registry) == describe(recover(root)) == after
        if not reached:
            break
    assert bool(raised) is not step.quiet


def check_outcome(
    registry: Registry,
    fs: Failing,
    error: Exception | None,
    number: int,
    states: tuple[State, State],
    acknowledged: bool,
    root: Path,
) -> None:
    before, after = states
    if error is not None:
        assert isinstance(error, StorageFull if number == errno.ENOSPC else NotReady)
        assert "nobody" not in str(error) and str(root) not in str(error)
    # Whatever the disk does, memory is served.
    assert describe(registry) in (before, after)
    registry.refresh()
    assert describe(registry) in (before, after)
    fs.fail(0)
    assert describe(recover(root)) in ((after,) if acknowledged else (before, after))
    registry.refresh()


def test_a_failed_sync_is_never_acknowledged_and_its_files_are_not_used_again(memory_path: Path) -> None:
    """Linux forgets the pages that it could not write, and the next fsync of the same file succeeds."""
    written: list[str] = []

    class Remembering(Failing):
        def around(self, name, call, *args):  # type: ignore[no-untyped-def]
            if name == "open" and str(args[0]).endswith("/manifest.json"):
                written.append(str(args[0]))
            return super().around(name, call, *args)

    syncs = 0
    for at in itertools.count(1):
        fs = Remembering()
        registry = open_registry(memory_path / str(at), fs)
        written.clear()
        fs.fail(errno.EIO, at=at)
        fs.failed.clear()
        try:
            registry.publish("t", content(1))
        except NotReady:
            pass
        else:
            assert "fsync" not in fs.failed
            if not fs.failed:
                break
        if fs.failed == ["fsync"]:
            syncs += 1
            appended = registry._index.catch_up("t").head.seq
            registry.publish("t", content(1))
            assert len(written) == len(set(written)) and (appended or len(written) <= 2)
    assert syncs == 3 + 3 + 1 + 1 + 1 + 1  # folders of the task, files, their folder, its name, entry, its name


class Forgiving(Failing):
    """Notes the folders whose sync succeeds after one that failed although nothing was changed in between."""

    def __init__(self) -> None:
        super().__init__()
        self.failed_syncs: set[Path] = set()
        self.hollow: list[Path] = []
        self._open: dict[int, Path] = {}

    def around(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        if name in ("mkdir", "link", "rename", "unlink") or (name == "open" and args[1] & os.O_CREAT):
            self.failed_syncs -= {path.parent for path in args[:2] if isinstance(path, Path)}
        path = self._open.get(args[0]) if name == "fsync" else None
        try:
            result = super().around(name, call, *args)
        except OSError:
            self.failed_syncs |= {path} if path else set()
            raise
        if name == "open":
            self._open[result] = Path(args[0])
        if path in self.failed_syncs:
            self.hollow.append(path)
        return result


def test_a_folder_whose_sync_failed_is_changed_before_the_next_one_counts(memory_path: Path) -> None:
    """Else a kernel that forgets what it could not write has nothing to do, and a retry is acknowledged for nothing."""
    failed = 0
    for earlier, at in itertools.product((False, True), range(1, 50)):
        fs, root = Forgiving(), memory_path / f"{earlier}-{at}"
        registry = open_registry(root, fs)
        if earlier:  # what is tried is published already, perhaps by a process that died before it was durable
            registry.publish("t", content(1))
        fs.fail(errno.EIO, at=at)
        with suppress(NotReady):
            registry.publish("t", content(1))
        failed += root / "t/log" in fs.failed_syncs
        fs.fail(0)
        registry.publish("t", content(1))
        assert root / "t/log" not in fs.hollow
    assert failed == 1


def test_prompts_in_memory_are_served_while_the_disk_fails(memory_path: Path) -> None:
    fs = Failing()
    registry = open_registry(memory_path / "prompts", fs)
    registry.publish("t", content(1))
    registry.pin("t").release()
    for number in ERRORS:
        fs.fail(number, at=1, lasting=True)
        with pytest.raises((NotReady, StorageFull)):
            registry.publish("t", content(2))
        for _ in range(3):
            registry.refresh()
            registry.sweep()
            pin = registry.pin("t")
            assert pin.version.number == 1 and pin.prompt.digest == content(1).prompt.digest
            pin.release()
    fs.fail(0)
    assert registry.publish("t", content(2)).created


def test_a_start_with_a_failing_disk_says_so_and_a_later_one_is_whole(memory_path: Path) -> None:
    """Tasks whose log cannot be read are unavailable, not empty; they come back by themselves."""
    root = memory_path / "prompts"
    first = open_registry(root)
    for task in ("a", "b"):
        first.publish(task, content(1))
    for at in itertools.count(1):
        fs = Failing()
        fs.fail(errno.EIO, at=at)
        try:
            registry = open_registry(root, fs)
        except NotReady:
            continue
        if not fs.failed:
            break
        assert len(registry.tasks()) == 1
        registry.refresh()
        assert describe(registry) == describe(first)


def test_nfs_says_that_a_link_exists_which_it_has_just_made(memory_path: Path) -> None:
    """The answer was lost, the client asked again: taken for a lost race, the version would be moved away."""

    class Forgetful(Interposed):
        def around(self, name, call, *args):  # type: ignore[no-untyped-def]
            result = super().around(name, call, *args)
            if name == "link":
                raise FileExistsError(errno.EEXIST, "File exists")
            return result

    registry = open_registry(memory_path / "prompts", Forgetful())
    assert registry.publish("t", content(1)).version.number == 1
    assert registry.move_alias("t", "prod", 1, expected=None).etag == 2
    assert describe(recover(memory_path / "prompts")) == describe(registry)
