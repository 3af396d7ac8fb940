"""The audit log: who changed what and who was refused. Bounded, and written to the database in batches."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DataError

from app.access import tables
from app.access.database import Database

logger = logging.getLogger(__name__)

MAX_UNWRITTEN = 10_000  # entries in memory while the database is away; the log lines have the rest
MAX_TARGET = 300  # characters


@dataclass(frozen=True)
class AuditEntry:
    """One change, or one that was refused for want of a scope."""

    request_id: str
    key_id: str
    action: str  # the name of the operation
    target: str
    status: int  # of HTTP
    time: int  # Unix seconds
    id: int | None = None  # in the database

    @classmethod
    def now(cls, *, request_id: str, key_id: str, action: str, target: str, status: int) -> AuditEntry:
        return cls(request_id, key_id, action, escaped(target[:MAX_TARGET])[:MAX_TARGET], status, int(time.time()))


def escaped(text: str) -> str:
    """What can be printed stays. PostgreSQL stores no NUL, and a terminal obeys ESC."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class AuditQueue:
    """Entries on their way to the database, each told to the log at once. For the event loop alone."""

    def __init__(self) -> None:
        self._entries: deque[AuditEntry] = deque(maxlen=MAX_UNWRITTEN)

    def add(self, entry: AuditEntry) -> None:
        log_entry(entry)
        self._entries.append(entry)

    def take(self) -> list[AuditEntry]:
        entries = list(self._entries)
        self._entries.clear()
        return entries

    def give_back(self, entries: Sequence[AuditEntry]) -> None:
        """They could not be written. The oldest go where there is no room for all."""
        room = MAX_UNWRITTEN - len(self._entries)
        self._entries.extendleft(reversed(entries[max(0, len(entries) - room) :]))


def log_entry(entry: AuditEntry) -> None:
    """One line of JSON, in which nothing that a client sent can start another."""
    told = {name: value for name, value in asdict(entry).items() if name not in ("id", "time")}
    logger.info("audit %s", json.dumps(told))


def write_audit(database: Database, entries: Sequence[AuditEntry], *, keep: int) -> None:
    """Add entries, and drop the oldest but `keep`: of changes and of refusals, each for itself.

    Else whoever holds any key could push the changes out by being refused. An entry that the database does not take is
    left to the log's line, so that it keeps no other one out. Blocks. Raises NotReady.
    """
    if not entries:
        return
    rows = [{**asdict(entry), "refused": int(entry.status >= 400)} for entry in entries]
    for row in rows:
        del row["id"]
    with database.writing() as connection:
        if not _insert(connection, rows):
            for row in rows:
                if not _insert(connection, [row]):
                    logger.error("the database takes no audit entry for request %s", row["request_id"])
        for refused in (0, 1):
            of_kind = tables.audit.c.refused == refused
            newest_to_go = sa.select(tables.audit.c.id).where(of_kind).order_by(tables.audit.c.id.desc()).offset(keep)
            last = connection.execute(newest_to_go.limit(1)).scalar()
            if last is not None:
                connection.execute(sa.delete(tables.audit).where(of_kind, tables.audit.c.id <= last))


def _insert(connection: sa.Connection, rows: Sequence[dict[str, Any]]) -> bool:
    """All or, with False, none."""
    try:
        with connection.begin_nested():
            connection.execute(sa.insert(tables.audit), rows)
    except DataError:
        return False
    return True


def read_audit(database: Database, *, limit: int, before: int | None = None) -> list[AuditEntry]:
    """The newest first; with `before`, those older than the entry of this id. Blocks. Raises NotReady."""
    columns = [column for column in tables.audit.c if column.name != "refused"]
    found = sa.select(*columns).order_by(tables.audit.c.id.desc()).limit(limit)
    if before is not None:
        found = found.where(tables.audit.c.id < before)
    with database.reading() as connection:
        return [AuditEntry(**row) for row in connection.execute(found).mappings()]
