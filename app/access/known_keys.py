"""The keys as they were when last read: what a request is checked against, without the database."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from app.access.key import MAX_SECRET, Key, hash_secret


class KnownKeys:
    """Immutable."""

    def __init__(self, keys: Iterable[Key] = (), *, revision: int | None = None) -> None:
        self.revision = revision
        self._by_hash = {key.hash: key for key in keys}
        self.any_daily = any(key.limits.tokens_per_day for key in self._by_hash.values())

    def __len__(self) -> int:
        return len(self._by_hash)

    def find(self, secret: str) -> Key | None:
        """Revoked and expired ones too. Takes as long for a wrong secret, however near it is to a right one."""
        if len(secret) > MAX_SECRET:
            return None
        # The table is looked up by the hash, of which a stranger can choose no part.
        wanted = hash_secret(secret)
        key = self._by_hash.get(wanted)
        return key if key is not None and hmac.compare_digest(key.hash, wanted) else None

    def by_id(self, key_id: str) -> Key | None:
        """Revoked and expired ones too."""
        return next((key for key in self._by_hash.values() if key.id == key_id), None)

    def valid_ids(self, now: float) -> set[str]:
        return {key.id for key in self._by_hash.values() if key.is_valid(now)}
