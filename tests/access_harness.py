"""A server with keys, over a clock that stands still unless it is told to go on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.access import Access, Database, KeyStore
from app.config import Settings
from app.main import create_app
from tests.api_harness import Harness

NOON = 1_700_000_000.0 - 1_700_000_000 % 86_400 + 43_200  # of some day, Unix seconds


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@dataclass
class KeyedHarness(Harness):
    access: Access
    database: Database
    store: KeyStore
    clock: Clock

    @classmethod
    def keyed(
        cls, root: Path, *, api_key: str | None = None, clock: Clock | None = None, **access: Any
    ) -> KeyedHarness:
        """Nothing is made until the first key is."""
        plain = Harness.create(root)
        clock = clock or Clock()
        database = Database.of(Settings(registry=root))
        guard = Access(database, api_key=api_key, clock=clock, now=clock, **access)
        guard.load()
        app = create_app(plain.settings, plain.engine, plain.registry, plain.base, guard)
        return cls(
            plain.settings,
            plain.engine,
            plain.registry,
            plain.base,
            app,
            guard,
            database,
            KeyStore(database, now=clock),
            clock,
        )

    def key(self, *scopes: Any, **options: Any) -> dict[str, str]:
        """Headers with a new key, which the server knows from its next look on."""
        self.database.prepare()
        _, secret = self.store.create("test", scopes=scopes or ["generate"], **options)
        self.access.load()
        return bearer(secret)

    def key_id(self, headers: dict[str, str]) -> str:
        found = self.access._known.find(headers["Authorization"].split()[1])
        assert found is not None
        return found.id
