"""Where a batch's answers go: a file that is a journal while they come and sorted in the end, or stdout."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import typer
from filelock import FileLock, Timeout

from app.cli.output import to_json, write_json
from app.cli.rows import Row

_BEGINNING = b'{"line": '  # of every record
_TORN = re.compile(re.escape(_BEGINNING) + rb"[0-9]*(,.*)?", re.DOTALL)


class Answers(Protocol):
    """They are added in any order."""

    def begin(self, rows: Iterable[Row]) -> tuple[int, int]:
        """How many rows there are, and how many of them are answered. Changes nothing yet."""

    def is_done(self, row: Row) -> bool: ...

    def add(self, record: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


class PrintedAnswers:
    """To stdout, in the order of the rows; nothing is ever done before."""

    def __init__(self) -> None:
        self._lines: Iterator[int] = iter(())
        self._waiting: dict[int, dict[str, Any]] = {}
        self._next: int | None = None

    def begin(self, rows: Iterable[Row]) -> tuple[int, int]:
        lines = [row.line for row in rows]
        self._lines = iter(lines)
        self._next = next(self._lines, None)
        return len(lines), 0

    def is_done(self, row: Row) -> bool:
        return False

    def add(self, record: dict[str, Any]) -> None:
        self._waiting[record["line"]] = record
        while self._next is not None and self._next in self._waiting:
            write_json(self._waiting.pop(self._next))
            self._next = next(self._lines, None)

    def finish(self) -> None: ...


@dataclass(frozen=True)
class _Place:
    start: int
    length: int  # without the line feed
    key: str
    failed: bool


class AnswerFile:
    """A file that may exist: what is in it counts, but for errors and a last line that was torn.

    With `restart` nothing in it counts. Until the first answer is there the file stays as it was. While rows are asked
    they stand in the order in which they were answered. Raises BadParameter for a file that is something else, or in
    use; OSError.
    """

    def __init__(self, path: Path, *, restart: bool = False) -> None:
        self._name = path
        self._path = Path(os.path.realpath(path))  # a link to the file is to stay one
        self._restart = restart
        self._file: BinaryIO | None = None
        if self._path.exists():
            if not self._path.is_file():
                raise typer.BadParameter(f"{path} is no file to keep answers in")
            open(self._path, "r+b").close()  # else it would be found at the first answer that it may not be written
        self._lock = FileLock(self._path.with_name(f".{self._path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise typer.BadParameter(f"another batch writes to {path}") from None
        self._end = 0  # of what counts
        self._places: dict[int, _Place] = {}
        try:
            if not restart and self._path.exists():
                self._read()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        # NOTE: while it is held. Once it is released the next batch may hold it, and a third would make a new one.
        with suppress(OSError):  # Windows keeps a file that is open
            os.unlink(self._lock.lock_file)
        self._lock.release()

    def begin(self, rows: Iterable[Row]) -> tuple[int, int]:
        """Raises BadParameter where the file has answers to other rows than these."""
        total = done = 0
        others = set(self._places)
        for row in rows:
            total, done = total + 1, done + self.is_done(row)
            others.discard(row.line)
        for line in sorted(others):
            if not self._places[line].failed:
                raise self._refusal(f"has an answer to line {line}, where IN has no row")
            del self._places[line]  # a row that could not be answered, and was taken out
        return total, done

    def is_done(self, row: Row) -> bool:
        """A row that failed and was changed since is asked as it is now. Raises BadParameter for any other change."""
        place = self._places.get(row.line)
        if place is None or place.failed:
            return False
        if place.key != row.key:
            raise self._refusal(f"answers something else in line {row.line}")
        return True

    def add(self, record: dict[str, Any]) -> None:
        """Whole or, if the process is killed meanwhile, torn: the next reading mends it."""
        data = to_json(record).encode()
        file = self._opened()
        start = file.seek(0, os.SEEK_END)
        _write(file, data + b"\n")
        self._places[record["line"]] = _Place(start, len(data), record["request"], "error" in record)

    def finish(self) -> None:
        """Put the rows in order; the file is one or the other at any time."""
        file = self._opened()
        with self._replacing() as ordered:
            for _, place in sorted(self._places.items()):
                file.seek(place.start)
                ordered.write(file.read(place.length) + b"\n")

    def _opened(self) -> BinaryIO:
        """For adding behind what counts."""
        if self._file is None:
            if self._restart and self._path.exists():
                with self._replacing():
                    pass
            self._file = open(self._path, "a+b", buffering=0)
            self._file.truncate(self._end)
            self._file.seek(max(0, self._end - 1))
            if self._file.read(1) not in (b"", b"\n"):
                self._file.write(b"\n")
        return self._file

    @contextmanager
    def _replacing(self) -> Iterator[BinaryIO]:
        """What takes the file's place, with its mode, once it is whole and on the disk."""
        path = self._path.with_name(f".{self._path.name}.sorted")
        path.unlink(missing_ok=True)  # of a process that was killed
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as draft:
                path.chmod(stat.S_IMODE(self._path.stat().st_mode))
                yield draft
                draft.flush()
                os.fsync(draft.fileno())
            os.replace(path, self._path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _read(self) -> None:
        with open(self._path, "rb") as lines:
            for line in lines:
                record = line.removesuffix(b"\n")
                found = _parsed(record)
                if found is None and record == line and _is_torn(line):
                    return
                if found is None:
                    raise typer.BadParameter(f"{self._name} is not the output of a batch")
                key, failed = found["request"], "error" in found
                self._places[found["line"]] = _Place(self._end, len(record), key, failed)
                self._end += len(line)

    def _refusal(self, what: str) -> typer.BadParameter:
        return typer.BadParameter(f"{self._name} {what}: other rows or options; name another file, or --restart")


def _parsed(record: bytes) -> dict[str, Any] | None:
    """None for what `Row.record` did not make."""
    try:
        found = json.loads(record)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or type(found.get("line")) is not int or not isinstance(found.get("request"), str):
        return None
    return found


def _is_torn(line: bytes) -> bool:
    """Whether it may be the beginning of a record: what is none is somebody else's, and not ours to remove."""
    return _BEGINNING.startswith(line) or _TORN.fullmatch(line) is not None


def _write(file: BinaryIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
