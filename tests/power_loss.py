"""A model of a disk that loses its power: what may be left of the calls that a store has made.

A file's bytes are certain once it is synced, and a name once its folder is. Until then a name may be there or
not, each on its own, and a file may be empty, cut short, zeros, or whole. That is more than journaling file
systems allow themselves, and what POSIX promises.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from tests.interposed_files import WRITES, Interposed

Tree = tuple[tuple[str, "Tree | bytes"], ...]  # name -> folder or file, sorted


MOST = 2000  # states of one folder that are enumerated; without a planted mistake there are far fewer


class File:
    def __init__(self) -> None:
        self.data = b""
        self.synced: bytes | None = None

    def sync(self) -> None:
        self.synced = self.data

    def possible(self) -> list[bytes]:
        if self.synced == self.data:
            return [self.data]
        half = self.data[: len(self.data) // 2]
        found = [self.data, b"", half, bytes(len(self.data)), *([self.synced] if self.synced is not None else [])]
        return list(dict.fromkeys(found))


class Folder:
    def __init__(self) -> None:
        # Each name with all it has meant since the last sync, which settles the last one.
        self._names: dict[str, list[Node | None]] = {}

    def __getitem__(self, name: str) -> Node:
        node = self._names[name][-1]
        assert node is not None
        return node

    def __setitem__(self, name: str, node: Node | None) -> None:
        self._names.setdefault(name, [None]).append(node)

    def sync(self) -> None:
        self._names = {name: [nodes[-1]] for name, nodes in self._names.items() if nodes[-1] is not None}

    def possible(self) -> Iterator[Tree]:
        choices: list[list[tuple[str, Tree | bytes] | None]] = []
        for name in sorted(self._names):
            found: list[tuple[str, Tree | bytes] | None] = []
            for node in dict.fromkeys(reversed(self._names[name])):
                found += [None] if node is None else [(name, content) for content in node.possible()]
            choices.append(found)
        for choice in _combinations(choices):
            yield tuple(item for item in choice if item is not None)


Node = File | Folder
T = TypeVar("T")


def _combinations(choices: list[list[T]]) -> Iterator[tuple[T, ...]]:
    """All, or where they are too many those in which one differs from the latest, and the oldest."""
    if math.prod(map(len, choices)) <= MOST:
        yield from itertools.product(*choices)
        return
    latest = tuple(choice[0] for choice in choices)
    for position, choice in enumerate(choices):
        for item in choice:
            yield (*latest[:position], item, *latest[position + 1 :])
    yield tuple(choice[-1] for choice in choices)


class Died(BaseException):
    """The process was killed here."""


class Disk(Interposed):
    """A file system below `top`, which starts empty, with a model of it beside.

    `lazy` names the syncs that do nothing, by the position of the call in the store's code: a planted mistake.
    """

    def __init__(self, top: Path, lazy: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.root = Folder()
        self.syncs: list[str] = []
        self.on_call: Callable[[], None] = lambda: None
        self._dies_at = 0
        self._top = top
        self._lazy = lazy
        self._open: dict[int, Node] = {}
        self._temporary: dict[str, str] = {}

    def around(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        if self._dies_at and self.count + 1 >= self._dies_at:
            raise Died  # and what is called to clean up does not happen either
        if name in WRITES:
            self.on_call()
        result = super().around(name, call, *args)
        if note := getattr(self, f"_note_{name}", None):
            note(result, *args)
        return result

    def die(self, at: int) -> None:
        """Raise Died at call `at` from here (from 1) and at every later one."""
        self.count, self._dies_at = 0, at

    def revive(self) -> None:
        """As another process finds it: the power is still on."""
        self._dies_at = 0
        for file in self._open:
            os.close(file)
        self._open.clear()

    def _find(self, path: Path | str, folder: int | None = None) -> tuple[Folder, str]:
        node: Node = self.root if folder is None else self._open[folder]
        parts = (str(path),) if folder is not None else Path(path).relative_to(self._top).parts
        for part in parts[:-1]:
            assert isinstance(node, Folder)
            node = node[self._steady(part)]
        assert isinstance(node, Folder)
        return node, self._steady(parts[-1]) if parts else ""

    def _steady(self, name: str) -> str:
        """Temporary names by their order, so that two runs have the same states."""
        if not name.startswith(".tmp-"):
            return name
        return self._temporary.setdefault(name, f".tmp-{len(self._temporary)}")

    def _note_open(self, file: int, path: Path | str, flags: int, folder: int | None = None) -> None:
        if folder is None and not Path(path).is_relative_to(self._top):
            self._open[file] = Folder()  # above the top, which is there for good
            return
        parent, name = self._find(path, folder)
        if flags & os.O_CREAT:
            parent[name] = File()
        self._open[file] = parent[name] if name else parent

    def _note_close(self, _: None, file: int) -> None:
        del self._open[file]

    def _note_write(self, written: int, file: int, data: memoryview) -> None:
        node = self._open[file]
        assert isinstance(node, File)
        node.data += bytes(data[:written])

    def _note_fsync(self, _: None, file: int) -> None:
        site = call_site()
        self.syncs.append(site)
        if site not in self._lazy:
            self._open[file].sync()

    def _note_mkdir(self, _: None, path: Path) -> None:
        parent, name = self._find(path)
        parent[name] = Folder()

    def _note_link(self, _: None, source: Path, target: Path) -> None:
        (old, name), (new, to) = self._find(source), self._find(target)
        new[to] = old[name]

    def _note_rename(self, _: None, source: Path, target: Path) -> None:
        self._note_link(None, source, target)
        self._note_unlink(None, source)

    def _note_unlink(self, _: None, path: Path | str, folder: int | None = None) -> None:
        parent, name = self._find(path, folder)
        parent[name] = None

    _note_rmdir = _note_unlink


def call_site() -> str:
    """Where in the registry's code this call comes from: three functions, innermost last."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None and len(found) < 3:
        folder, function = os.path.dirname(frame.f_code.co_filename), frame.f_code.co_name
        if folder.endswith("/registry") and not (found and found[-1].startswith(f"{function}:")):
            found.append(f"{function}:{frame.f_lineno}")
        frame = frame.f_back
    return " ".join(reversed(found))


def write(tree: Tree, folder: Path) -> None:
    folder.mkdir()
    for name, content in tree:
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            write(content, folder / name)
