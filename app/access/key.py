"""A key: what it may do, for how long and how fast. Its secret is known to its holder alone."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

Scope = Literal["generate", "prompts:read", "prompts:write", "aliases:write", "jobs", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

SETTINGS_KEY_ID = "key_settings"  # of the key in SOFTPROMPT_API_KEY

SECRET_BYTES = 32
PREFIX_LENGTH = 7  # of a secret's characters, to recognise it by: "sk-" and 24 of its 256 bits
MAX_SECRET = 512  # characters; a longer one is no key and is not even hashed


@dataclass(frozen=True)
class Limits:
    """None: no such limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None  # by UTC days, over restarts
    max_parallel: int | None = None


@dataclass(frozen=True)
class Key:
    """Times are Unix seconds."""

    id: str
    name: str
    prefix: str
    hash: str  # of the secret, see `hash_secret`
    scopes: frozenset[Scope]
    tasks: tuple[str, ...] | None  # patterns of fnmatch; None: every task and the bare base model
    tenant: str
    limits: Limits
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    last_used_at: int | None = None

    @property
    def is_stored(self) -> bool:
        """False for the one key of the settings, which the database does not know."""
        return self.id != SETTINGS_KEY_ID

    def has(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    def sees(self, name: str) -> bool:
        """Whether the key may know of a task, or of the base model, by this name."""
        return self.tasks is None or any(fnmatchcase(name, pattern) for pattern in self.tasks)

    def is_valid(self, now: float) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def new_secret() -> str:
    return f"sk-{secrets.token_urlsafe(SECRET_BYTES)}"


def new_id() -> str:
    return f"key_{secrets.token_hex(8)}"


def hash_secret(secret: str) -> str:
    """sha256, in hex. A secret of 256 random bits needs neither salt nor a slow hash."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
