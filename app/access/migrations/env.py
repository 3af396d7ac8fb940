"""Alembic runs this. The connection, in a transaction and under the lock, comes from app.access.database."""

from __future__ import annotations

from alembic import context

from app.access.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
