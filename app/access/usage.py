"""Tokens that keys used, by UTC day: counted in memory, written to the database in batches."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from app.access import tables
from app.access.database import Database

DAY = 86_400  # seconds
KEPT_DAYS = 35

Batch = Counter[tuple[str, int]]  # tokens by key and day


class Usage:
    """What this process counted and has not written yet, on top of what the database had when last read.

    Servers that share a database thus see each other's tokens a second or two late. For the event loop alone.
    """

    def __init__(self, *, now: Callable[[], float] = time.time) -> None:
        """`now` gives Unix seconds."""
        self._now = now
        self._stored: tuple[int, Mapping[str, int]] = (0, {})  # day, and tokens by key
        self._counted: Batch = Counter()
        self._being_written: Batch = Counter()

    @property
    def today(self) -> int:
        """Days since 1970."""
        return int(self._now() // DAY)

    @property
    def seconds_left(self) -> float:
        """Until the next day."""
        return (self.today + 1) * DAY - self._now()

    def add(self, key_id: str, tokens: int) -> None:
        self._counted[key_id, self.today] += tokens

    def of(self, key_id: str) -> int:
        """Tokens of today."""
        today = self.today
        day, stored = self._stored
        known = stored.get(key_id, 0) if day == today else 0
        return known + self._counted[key_id, today] + self._being_written[key_id, today]

    def take(self) -> Batch:
        """What is to be written; `written` or `give_back` has to follow before the next."""
        self._being_written, self._counted = self._counted, Counter()
        return self._being_written

    def written(self, day: int, stored: Mapping[str, int]) -> None:
        """The batch is in the database, which has these tokens by key on this day."""
        self._stored = day, stored
        self._being_written = Counter()

    def give_back(self) -> None:
        """The batch could not be written."""
        self._counted += self._being_written
        self._being_written = Counter()


def write_usage(database: Database, batch: Batch, day: int) -> dict[str, int]:
    """Add a batch, if there is any; what the database has for `day` then. Blocks. Raises NotReady."""
    if batch:
        with database.writing() as connection:
            for (key_id, counted_on), tokens in sorted(batch.items()):
                _add(connection, key_id, counted_on, tokens)
            connection.execute(sa.delete(tables.usage).where(tables.usage.c.day < day - KEPT_DAYS))
    with database.reading() as connection:
        return read_usage(connection, day)


def read_usage(connection: sa.Connection, day: int) -> dict[str, int]:
    """Tokens by key on a day."""
    found = sa.select(tables.usage.c.key_id, tables.usage.c.tokens).where(tables.usage.c.day == day)
    return {row.key_id: row.tokens for row in connection.execute(found)}


def _add(connection: sa.Connection, key_id: str, day: int, tokens: int) -> None:
    more = (
        sa.update(tables.usage)
        .where(tables.usage.c.key_id == key_id, tables.usage.c.day == day)
        .values(tokens=tables.usage.c.tokens + tokens)
    )
    if connection.execute(more).rowcount:
        return
    try:
        with connection.begin_nested():
            connection.execute(sa.insert(tables.usage).values(key_id=key_id, day=day, tokens=tokens))
    except IntegrityError:  # another server was first
        connection.execute(more)
