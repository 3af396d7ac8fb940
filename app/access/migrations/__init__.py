"""Alembic migrations, shipped in the package; app.access.database runs them."""
