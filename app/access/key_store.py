"""Keys in the database: made, revoked, read. Every call blocks, and raises NotReady if the database does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from app.access import tables
from app.access.database import Database
from app.access.key import PREFIX_LENGTH, SCOPES, Key, Limits, Scope, hash_secret, new_id, new_secret
from app.errors import InvalidRequest

MAX_NAME = 200  # characters, of a tenant too
MAX_TASKS = 100
_LIMITS = tuple(asdict(Limits()))


class KeyStore:
    def __init__(self, database: Database, *, now: Callable[[], float] = time.time) -> None:
        """`now` gives Unix seconds."""
        self._database = database
        self._now = now

    def create(
        self,
        name: str,
        *,
        scopes: Iterable[Scope],
        tasks: Sequence[str] | None = None,
        tenant: str | None = None,
        limits: Limits | None = None,
        expires_in: float | None = None,
    ) -> tuple[Key, str]:
        """A new key and its secret, which is not kept. `expires_in` is in seconds.

        Raises InvalidRequest for what makes no key.
        """
        given = frozenset(scopes)
        limits = limits or Limits()
        _check(name, given, tasks, tenant, limits, expires_in)
        secret, key_id, now = new_secret(), new_id(), int(self._now())
        key = Key(
            id=key_id,
            name=name,
            prefix=secret[:PREFIX_LENGTH],
            hash=hash_secret(secret),
            scopes=given,
            tasks=None if tasks is None else tuple(tasks),
            tenant=key_id if tenant is None else tenant,
            limits=limits,
            created_at=now,
            expires_at=None if expires_in is None else now + int(expires_in),
        )
        with self._database.writing() as connection:
            connection.execute(sa.insert(tables.keys).values(_row(key)))
            _count_up(connection)
        return key, secret

    def revoke(self, key_id: str) -> bool:
        """False if there is no such key. To revoke twice does no harm, and leaves the first time."""
        with self._database.writing() as connection:
            revoked = connection.execute(
                sa.update(tables.keys)
                .where(tables.keys.c.id == key_id)
                .values(revoked_at=sa.func.coalesce(tables.keys.c.revoked_at, int(self._now())))
            )
            _count_up(connection)
        return revoked.rowcount > 0

    def all(self) -> list[Key]:
        """Oldest first, revoked and expired ones among them."""
        return self.read_if_changed(None)[1] or []

    def read_if_changed(self, known: int | None) -> tuple[int, list[Key] | None]:
        """The revision of the keys, and all of them if it is not the one that is `known`."""
        with self._database.reading() as connection:
            number: int = connection.execute(sa.select(tables.revision.c.number)).scalar_one()
            if number == known:
                return number, None
            rows = connection.execute(sa.select(tables.keys).order_by(tables.keys.c.created_at, tables.keys.c.id))
            return number, [_key(row) for row in rows.mappings()]

    def touch(self, used_at: dict[str, int]) -> None:
        """Note when keys were last used, in Unix seconds."""
        if not used_at:
            return
        statement = (
            sa.update(tables.keys)
            .where(tables.keys.c.id == sa.bindparam("key"))
            .values(last_used_at=sa.bindparam("used_at"))
        )
        with self._database.writing() as connection:
            connection.execute(statement, [{"key": key, "used_at": when} for key, when in sorted(used_at.items())])


def _count_up(connection: sa.Connection) -> None:
    connection.execute(sa.update(tables.revision).values(number=tables.revision.c.number + 1))


def _row(key: Key) -> dict[str, Any]:
    row = asdict(key)
    del row["limits"]
    return {**row, **asdict(key.limits), "scopes": sorted(key.scopes), "tasks": key.tasks and list(key.tasks)}


def _key(row: Any) -> Key:
    fields = dict(row)
    limits = Limits(**{name: fields.pop(name) for name in _LIMITS})
    tasks = fields.pop("tasks")
    # A scope that this version does not know allows nothing.
    stored = fields.pop("scopes")
    scopes = frozenset(scope for scope in SCOPES if scope in stored)
    return Key(**fields, scopes=scopes, tasks=None if tasks is None else tuple(tasks), limits=limits)


def _check(
    name: str,
    scopes: frozenset[Scope],
    tasks: Sequence[str] | None,
    tenant: str | None,
    limits: Limits,
    expires_in: float | None,
) -> None:
    for param, text in (("name", name), ("tenant", tenant)):
        if text is not None and not (0 < len(text) <= MAX_NAME and text.isprintable()):
            raise InvalidRequest(f"{param}: 1 to {MAX_NAME} printable characters", param=param)
    if not scopes or scopes - set(SCOPES):
        raise InvalidRequest(f"scope: one or more of {', '.join(SCOPES)}", param="scope")
    if tasks is not None and not (
        0 < len(tasks) <= MAX_TASKS and all(0 < len(task) <= MAX_NAME and task.isprintable() for task in tasks)
    ):
        raise InvalidRequest(f"task: 1 to {MAX_TASKS} patterns of up to {MAX_NAME} characters", param="task")
    for param, number in asdict(limits).items():
        if number is not None and not 0 < number < 2**53:
            raise InvalidRequest(f"{param} must be 1 or more", param=param)
    if expires_in is not None and not 1 <= expires_in <= 100 * 366 * 86_400:
        raise InvalidRequest("expires: between a second and a hundred years from now", param="expires")
