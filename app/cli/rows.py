"""Rows of a JSONL file, each with what is asked for it or why nothing can be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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
            asked = json.dumps([kind, request], sort_keys=True)
            json.dumps(request, ensure_ascii=False).encode()
        except InvalidRow as error:
            yield Row(number, _key(line), problem=str(error), id=row_id)
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, but not send it
            yield Row(number, _key(line), problem="the row has half a surrogate pair, which is no text", id=row_id)
        except (ValueError, RecursionError):  # UnicodeDecodeError too
            yield Row(number, _key(line), problem="the line is no JSON in UTF-8")
        else:
            yield Row(number, _key(asked.encode()), request, id=row_id)


def _key(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
