"""Who may come in: keys, checked in memory against a copy of the database that is never older than it may be."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

import anyio
import anyio.to_thread

from app.access.audit import AuditEntry, AuditQueue, log_entry, read_audit, write_audit
from app.access.caller import ANONYMOUS, Caller
from app.access.database import Database
from app.access.key import SETTINGS_KEY_ID, Key, Limits, hash_secret
from app.access.key_store import KeyStore
from app.access.known_keys import KnownKeys
from app.access.meter import Meter
from app.access.usage import Usage, write_usage
from app.config import Settings
from app.errors import AuthenticationRequired, NotReady, SoftpromptError

logger = logging.getLogger(__name__)
T = TypeVar("T")

POLL = 1.0  # seconds between looks into the database
FRESH = 2.0  # seconds within which a new or revoked key counts
PATIENCE = 1.0  # seconds that a request waits for a database that is late
OPEN_PATIENCE = 10.0  # seconds, while no key is known: all that is left then is to refuse
MAX_STALE = 300.0  # seconds that known keys go on without the database
TOUCH = 60  # seconds to which "last used" is exact
REPORT = 60.0  # seconds between log lines about strangers


class Access:
    """For one event loop. Open, to everyone, until there is a key: one of the settings, or any in the database."""

    def __init__(
        self,
        database: Database,
        *,
        api_key: str | None = None,
        audit_rows: int = 100_000,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`audit_rows` bounds the changes, and the refusals, that are kept. `now` gives Unix seconds."""
        self._database = database
        self._store = KeyStore(database, now=now)
        self._settings_key = KnownKeys([_settings_key(api_key)] if api_key is not None else [])
        self._audit_rows = audit_rows
        self._clock = clock
        self._now = now
        self._prepared = False
        self._known = KnownKeys()
        self._closed = api_key is not None  # never opens again
        self._read_at = self._failed_at = float("-inf")
        self._refreshing: asyncio.Task[None] | None = None
        self._writing = anyio.Lock()
        self._threads = anyio.CapacityLimiter(2)  # its own: a hanging database takes none from the registry
        self._usage = Usage(now=now)
        self._audit = AuditQueue()
        self._meters: dict[str, Meter] = {}
        self._touched: dict[str, int] = {}  # key id -> Unix seconds
        self._to_touch: dict[str, int] = {}
        self._reported_at = float("-inf")
        self.num_unauthenticated = 0

    @classmethod
    def open(cls, settings: Settings) -> Access:
        """Bring the database up to date and read it, where there is one. Blocks.

        Raises InvalidSettings, and NotReady if the database does not answer: without it nobody could be told apart.
        """
        api_key = settings.api_key.get_secret_value() if settings.api_key is not None else None
        access = cls(Database.of(settings), api_key=api_key, audit_rows=settings.audit_rows)
        if settings.database is not None:
            access._database.prepare()
        access.load()
        return access

    @property
    def is_open(self) -> bool:
        """Whether anybody may do anything, because there is no key."""
        return not self._closed

    def load(self) -> None:
        """Read the keys. Blocks, and is not for use beside requests; they see to it themselves."""
        self._take(self._clock(), self._read())
        if self._prepared:
            self._usage.written(self._usage.today, write_usage(self._database, self._usage.take(), self._usage.today))

    async def authenticate(self, secret: str | None) -> Caller:
        """Raises AuthenticationRequired, and NotReady while the database leaves it unknown whether there is a key."""
        if secret is not None and (key := self._settings_key.find(secret)):
            return self._caller(key)
        is_fresh = await self._ensure_fresh()
        if not self._closed:
            if not is_fresh:
                raise NotReady("the keys cannot be checked now")
            return Caller()
        found = self._known.find(secret) if secret is not None else None
        if found is not None and found.is_valid(self._now()):
            if not is_fresh and self._clock() - self._read_at > MAX_STALE:
                raise NotReady("the keys cannot be checked now")
            return self._caller(found)
        if secret is not None and found is None and not is_fresh:
            raise NotReady("the keys cannot be checked now")  # it may be a new one
        self._count_stranger()
        raise AuthenticationRequired("this needs a valid key: Authorization: Bearer sk-...")

    def holder(self, actor: str) -> Caller | None:
        """Who a request's `actor` is now: None once the key is revoked, expired or gone, and for anonymous callers
        once there are keys. For what goes on after the request; nothing is counted.
        """
        if actor == ANONYMOUS:
            return None if self._closed else Caller()
        key = self._settings_key.by_id(actor) or self._known.by_id(actor)
        return Caller(key) if key is not None and key.is_valid(self._now()) else None

    def audit(self, entry: AuditEntry) -> None:
        """Told to the log now, and to the database, where there is one, a second later."""
        if self._prepared:
            self._audit.add(entry)
        else:
            log_entry(entry)

    async def audit_page(self, *, limit: int, before: int | None) -> list[AuditEntry]:
        """The newest first. Raises NotReady."""
        if not self._prepared:
            return []
        await self.flush()
        return await self._in_thread(partial(read_audit, self._database, limit=limit, before=before))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the copy fresh and write what is counted; what is left of it, at the end."""
        stop = asyncio.Event()
        # NOTE: told to stop, not cancelled: a write that is cut short could be counted twice.
        polling = asyncio.create_task(self._poll(stop))
        try:
            yield
        finally:
            stop.set()
            await polling
            self._database.close()

    async def refresh(self) -> None:
        """Read the keys now, once for all who ask meanwhile. A database that fails leaves what is known."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        await asyncio.shield(self._refreshing)

    async def flush(self) -> None:
        """Write what was counted. What the database does not take is kept for the next time."""
        if self._prepared:
            await asyncio.shield(asyncio.create_task(self._flush()))

    async def _poll(self, stop: asyncio.Event) -> None:
        is_last = False
        while not is_last:
            try:
                async with asyncio.timeout(POLL):
                    await stop.wait()
            except TimeoutError:
                pass
            is_last = stop.is_set()  # NOTE: before the turn: what comes while it is at work is the next one's
            try:
                await self.refresh()
                await self.flush()
            except Exception:
                logger.exception("the keys could not be refreshed")

    async def _ensure_fresh(self) -> bool:
        """Whether what is known is, or has become, new enough for a request that came now."""
        now = self._clock()
        if now - self._read_at <= FRESH:
            return True  # nearly every request
        try:
            async with asyncio.timeout(PATIENCE if self._closed else OPEN_PATIENCE):
                # Twice, if one was under way that is too old for it by now.
                while now - self._read_at > FRESH and now - self._failed_at > POLL:
                    await self.refresh()
        except TimeoutError:
            self._failed_at = self._clock()
        # NOTE: not by the clock as it is now: a machine that is slow may take seconds for a read that came in time.
        return now - self._read_at <= FRESH

    async def _refresh(self) -> None:
        began = self._clock()
        try:
            self._take(began, await self._in_thread(self._read))
        except SoftpromptError as error:
            self._failed_at = self._clock()
            logger.warning("keys: %s", error.message)

    def _read(self) -> tuple[int | None, list[Key] | None]:
        if not self._prepared:
            if not self._database.exists:
                return None, None
            self._database.prepare()
            self._prepared = True
        return self._store.read_if_changed(self._known.revision)

    def _take(self, read_at: float, found: tuple[int | None, list[Key] | None]) -> None:
        revision, keys = found
        if keys is not None:
            self._known = KnownKeys(keys, revision=revision)
            self._closed = self._closed or len(self._known) > 0
            alive = self._known.valid_ids(self._now())
            self._meters = {key: meter for key, meter in self._meters.items() if key in alive | {SETTINGS_KEY_ID}}
            self._touched = {key: when for key, when in self._touched.items() if key in alive}
        self._read_at = read_at

    def _caller(self, key: Key) -> Caller:
        meter = self._meters.get(key.id)
        if meter is None:
            meter = self._meters[key.id] = Meter(key, self._usage, self._clock)
        now = int(self._now())
        if key.is_stored and now - self._touched.get(key.id, 0) >= TOUCH:
            self._touched[key.id] = self._to_touch[key.id] = now
        return Caller(key, meter)

    async def _flush(self) -> None:
        async with self._writing:
            day = self._usage.today
            batch = self._usage.take()
            try:
                if batch or self._known.any_daily:
                    write = partial(write_usage, self._database, batch, day)
                    self._usage.written(day, await self._in_thread(write))
            except NotReady:
                self._usage.give_back()
            entries = self._audit.take()
            try:
                await self._in_thread(partial(write_audit, self._database, entries, keep=self._audit_rows))
            except NotReady:
                self._audit.give_back(entries)
            touched, self._to_touch = self._to_touch, {}
            try:
                await self._in_thread(partial(self._store.touch, touched))
            except NotReady:
                self._to_touch = touched | self._to_touch

    def _count_stranger(self) -> None:
        """Of strangers only the number is kept, whatever they send."""
        self.num_unauthenticated += 1
        if self._clock() - self._reported_at >= REPORT:
            self._reported_at = self._clock()
            logger.warning("%d requests without a valid key so far", self.num_unauthenticated)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._threads)


def _settings_key(secret: str) -> Key:
    return Key(
        id=SETTINGS_KEY_ID,
        name="SOFTPROMPT_API_KEY",
        prefix="",
        hash=hash_secret(secret),
        scopes=frozenset(["admin"]),
        tasks=None,
        tenant=SETTINGS_KEY_ID,
        limits=Limits(),
        created_at=0,
    )
