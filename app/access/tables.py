"""The tables, as the newest migration leaves them."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Index, Integer, MetaData, String, Table

metadata = MetaData()

keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("prefix", String(16), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("scopes", JSON, nullable=False),
    Column("tasks", JSON(none_as_null=True)),
    Column("tenant", String(200), nullable=False),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("tokens_per_day", BigInteger),
    Column("max_parallel", BigInteger),
    Column("created_at", BigInteger, nullable=False),  # Unix seconds, as all times here
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    Column("last_used_at", BigInteger),
)

# One row, which every change of a key counts up: a server that polls it reads the keys only when they changed.
revision = Table("revision", metadata, Column("number", BigInteger, nullable=False))

usage = Table(
    "usage",
    metadata,
    Column("key_id", String(64), ForeignKey("keys.id"), primary_key=True),
    Column("day", Integer, primary_key=True),  # days since 1970, UTC
    Column("tokens", BigInteger, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    # SQLite counts up by itself only what it calls INTEGER.
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("time", BigInteger, nullable=False),
    Column("request_id", String(128), nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("action", String(64), nullable=False),
    Column("target", String(300), nullable=False),
    Column("status", Integer, nullable=False),
    Column("refused", Integer, nullable=False),  # 1 for a status from 400 on
    Index("audit_by_outcome", "refused", "id"),
    sqlite_autoincrement=True,
)
