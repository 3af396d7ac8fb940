"""Rows of a batch, and the file of their answers: a journal while they come, sorted when all are there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import typer
from filelock import FileLock, Timeout

from app.cli.output import write_json

Request = dict[str, Any]


class InvalidRow(Exception):
    pass


@dataclass(frozen=True)
class Row:
    """A line of the input, from 1. Exactly one of `request` and `problem` is set."""

    line: int
    key: str  # of the line and what is asked of it, in 16 hexadecimal digits
    request: Request | None = None
    problem: str | None = None
    id: Any = None  # the row's own name for itself, if it has one

    def record(self, **found: Any) -> dict[str, Any]:
        """What is written about it."""
        named = {} if self.id is None else {"id": self.id}
        return {"line": self.line, **named, **found, "request": self.key}


def read_rows(lines: Iterable[bytes], make: Callable[[dict[str, Any]], Request], kind: str = "") -> Iterator[Row]:
    """A row for each line that is not blank; `make` may raise InvalidRow. `kind` is what is asked of them all."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row_id = None
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise InvalidRow("a row is a JSON object")
            row_id = found.get("id")
            request = make(found)
        except InvalidRow as error:
            yield Row(number, _key(line), problem=str(error), id=row_id)
        except ValueError:  # UnicodeDecodeError too
            yield Row(number, _key(line), problem="the line is no JSON in UTF-8")
        else:
            yield Row(number, _key(json.dumps([kind, request], sort_keys=True).encode()), request, id=row_id)


class Answers(Protocol):
    """Where answers go, in any order."""

    def is_done(self, row: Row) -> bool: ...

    def add(self, record: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


class PrintedAnswers:
    """To stdout, in the order of `lines`; nothing is ever done before."""

    def __init__(self, lines: Iterable[int]) -> None:
        self._lines = iter(lines)
        self._waiting: dict[int, dict[str, Any]] = {}
        self._next = next(self._lines, None)

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
    length: int
    key: str
    failed: bool


class AnswerFile:
    """A file that may exist: what is in it counts, but for errors and a last line that was torn.

    While rows are asked they stand in the order in which they were answered. Raises BadParameter for a file that is
    something else, or in use; OSError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise typer.BadParameter(f"another batch writes to {path}") from None
        self._file: BinaryIO = open(path, "a+b", buffering=0)
        try:
            self._places = self._read()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def is_done(self, row: Row) -> bool:
        place = self._places.get(row.line)
        if place is None:
            return False
        if place.key != row.key:
            raise typer.BadParameter(
                f"{self._path} answers something else in line {row.line}: other rows or options; "
                "name another file, or --restart"
            )
        return not place.failed

    def add(self, record: dict[str, Any]) -> None:
        """Whole or, if the process is killed meanwhile, torn: the next reading mends it."""
        data = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._places[record["line"]] = _Place(start, len(data), record["request"], "error" in record)

    def finish(self) -> None:
        """Put the rows in order; the file is one or the other at any time."""
        draft = self._path.with_name(f".{self._path.name}.sorted")
        with open(draft, "wb") as ordered:
            for _, place in sorted(self._places.items()):
                self._file.seek(place.start)
                ordered.write(self._file.read(place.length))
            ordered.flush()
            os.fsync(ordered.fileno())
        os.replace(draft, self._path)

    def _read(self) -> dict[int, _Place]:
        places: dict[int, _Place] = {}
        self._file.seek(0)
        start = 0
        with open(self._path, "rb") as lines:
            for line in lines:
                found = _parsed(line)
                if found is None and not line.endswith(b"\n"):
                    self._file.truncate(start)
                    break
                if not isinstance(found, dict) or not {"line", "request"} <= found.keys():
                    raise typer.BadParameter(f"{self._path} is not the output of a batch")
                whole = line.rstrip(b"\n") + b"\n"
                places[found["line"]] = _Place(start, len(whole), found["request"], "error" in found)
                start += len(whole)
                if whole != line:
                    self._file.write(b"\n")
                    break
        return places


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _key(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
