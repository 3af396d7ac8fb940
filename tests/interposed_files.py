"""File systems for the store that count, fail or kill at one of their calls."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

from app.registry.durable import FileSystem

READS = ("read", "stat", "lstat", "names", "folders", "close")
WRITES = ("open", "write", "fsync", "mkdir", "link", "rename", "unlink", "rmdir")
CALLS = READS + WRITES
COMPOSED = ("write_file", "make_folders", "make_folder", "sync_folder", "sync_name", "remove")


def _interposed(name: str) -> Callable[..., Any]:
    original = getattr(FileSystem, name)

    def method(self: Interposed, *args: Any) -> Any:
        return self.around(name, partial(original, self), *args)

    return method


class Interposed(FileSystem):
    """Every call goes through `around`. Nothing is synced: what the page cache has is enough here."""

    def __init__(self) -> None:
        self.count = 0

    def around(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        self.count += 1
        return None if name == "fsync" else call(*args)


for _name in CALLS:
    setattr(Interposed, _name, _interposed(_name))


class Killing(Interposed):
    """SIGKILL before call `at` (from 1), or half-way through it if it writes and `torn`."""

    def __init__(self, at: int, *, torn: bool) -> None:
        super().__init__()
        self._at = at
        self._torn = torn

    def around(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        if self.count + 1 == self._at:
            if self._torn and name == "write":
                call(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().around(name, call, *args)


class Failing(Interposed):
    """Raise `number` at call `at` (from 1; 0: never), and at every later one if `lasting`.

    `late`: the call is made first, as over a network that loses the answer. `number` 0 cuts a write short.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fail(0)

    def fail(self, number: int, *, at: int = 0, lasting: bool = False, late: bool = False) -> None:
        self.count, self.failed = 0, list[str]()
        self._number, self._at, self._lasting, self._late = number, at, lasting, late

    def around(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        self.count += 1
        if not self._at or self.count < self._at or (self.count > self._at and not self._lasting):
            return None if name == "fsync" else call(*args)
        if not self._number:
            self.failed.append(name)
            return call(args[0], args[1][:1]) if name == "write" else None if name == "fsync" else call(*args)
        self.failed.append(name)
        if self._late or name == "close":  # Linux closes the descriptor whatever it answers
            result = None if name == "fsync" else call(*args)
            if name == "open":
                os.close(result)
        raise OSError(self._number, os.strerror(self._number), "/a/path/that/nobody/may/see")
