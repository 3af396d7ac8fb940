"""Who makes a request, as routes see it: what they may know of, and who pays."""

from __future__ import annotations

from dataclasses import dataclass

from app.access.key import Key, Scope
from app.access.meter import Meter
from app.errors import PermissionDenied

ANONYMOUS = "anonymous"


@dataclass(frozen=True)
class Caller:
    """The holder of a key; without one, anybody while the server is open."""

    key: Key | None = None
    meter: Meter | None = None

    @property
    def actor(self) -> str:
        return self.key.id if self.key else ANONYMOUS

    @property
    def tenant(self) -> str:
        return self.key.tenant if self.key else ""

    def sees(self, name: str) -> bool:
        """Whether the caller may know of a task, or of the base model, by this name."""
        return self.key is None or self.key.sees(name)

    def check_scope(self, scope: Scope | None) -> None:
        """Raises PermissionDenied. None is what every key may do."""
        if self.key is not None and scope is not None and not self.key.has(scope):
            raise PermissionDenied(f"this key lacks the scope {scope}")

    def salt(self, cache_salt: str | None) -> str:
        """Under which text is cached: one for each pair of tenant and `cache_salt`, whatever they are made of."""
        return f"{len(self.tenant)}:{self.tenant}{cache_salt or ''}"

    def spend(self, tokens: int) -> None:
        """Pay for tokens that were really read and written."""
        if self.meter is not None and tokens > 0:
            self.meter.spend(tokens)
