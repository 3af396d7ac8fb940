"""The database of keys: SQLite in a file of its own, or any server that SQLAlchemy speaks to. Every call blocks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, TimeoutError

from app.config import Settings
from app.errors import InvalidSettings, NotReady

logger = logging.getLogger(__name__)

TIMEOUT = 5  # seconds for a connection, a lock or a statement
_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 0x50F7  # any number, the same in every process


class Database:
    """Where keys, usage and audit are. Nothing is opened before the first call; SQLite is closed after each."""

    def __init__(self, url: str) -> None:
        """Raises InvalidSettings for a URL that is malformed or whose driver is not installed."""
        try:
            parsed = sa.make_url(url)
            self._file = _sqlite_file(parsed)
            self._engine = _engine(parsed, self._file)
        except (ArgumentError, NoSuchModuleError, ValueError):  # the last one for a port that is no number
            # NOTE: not their messages, which may repeat the URL and with it a password.
            raise InvalidSettings("the database is no URL that SQLAlchemy knows, such as sqlite:///keys.db") from None
        except ModuleNotFoundError as error:
            raise InvalidSettings(f"the database needs the Python package {error.name} (extra [postgres])") from None

    @classmethod
    def of(cls, settings: Settings) -> Database:
        """The one they name, else a file in the registry's folder. Its dot keeps it from being taken for a task."""
        if settings.database is not None:
            return cls(settings.database.get_secret_value())
        return cls(f"sqlite:///{settings.registry.absolute() / '.softprompt' / 'access.db'}")

    @property
    def exists(self) -> bool:
        """Whether there may be something in it: a SQLite file that is there, or any database server.

        Raises NotReady where that cannot be seen: a server would take it for no key, and be open.
        """
        if self._file is None:
            return True
        try:
            # NOTE: not Path.exists, to which what may not be looked at is an exception or, on Python 3.14, not there.
            os.stat(self._file)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise NotReady(f"the database of keys cannot be reached: {error.strerror}") from None
        return True

    def prepare(self) -> None:
        """Make the file (mode 0600) if there is none, and bring the tables up to date; safe from several processes.

        Raises InvalidSettings if that cannot be done here, and NotReady for a database that does not answer.
        """
        if self._file is not None:
            try:
                self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                os.close(os.open(self._file, os.O_CREAT | os.O_RDWR, 0o600))
            except OSError as error:
                raise InvalidSettings(f"the database of keys cannot be made: {error.strerror}") from None
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        try:
            with self.writing() as connection:
                if connection.dialect.name == "postgresql":  # SQLite has the lock already
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except CommandError as error:
            raise InvalidSettings(f"the database of keys is of another version: {error}") from None

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Raises NotReady if the database does not answer."""
        with _failures(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """One transaction, committed at the end. Raises NotReady if the database does not answer."""
        with _failures(), self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    def close(self) -> None:
        self._engine.dispose()


def _sqlite_file(url: sa.URL) -> Path | None:
    if url.get_backend_name() != "sqlite":
        return None
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise InvalidSettings("the database of keys must be a file: one in memory would forget them")
    return Path(url.database).expanduser().absolute()


def _engine(url: sa.URL, file: Path | None) -> sa.Engine:
    if file is None:
        options = {}
        if url.get_backend_name() == "postgresql":
            options = {"connect_timeout": TIMEOUT, "options": f"-c statement_timeout={TIMEOUT}s"}
        return sa.create_engine(
            url, pool_size=1, max_overflow=2, pool_timeout=TIMEOUT, pool_pre_ping=True, connect_args=options
        )
    # NOTE: rw, not rwc: a file that was deleted is an error, not a new database without keys.
    url = url.set(database=f"file:{quote(str(file))}", query={"mode": "rw", "uri": "true"})
    engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args={"timeout": TIMEOUT})

    # By itself Python's sqlite3 begins no transaction before DDL, and takes the lock of a writer too late.
    @sa.event.listens_for(engine, "connect")
    def _(connection, _record) -> None:  # type: ignore[no-untyped-def]
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def _(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except (DBAPIError, TimeoutError) as error:
        # The driver's own words may hold an address: for the log, not for a client.
        logger.warning("the database of keys failed: %s", type(error.__cause__ or error).__name__)
        logger.debug("the database of keys failed", exc_info=error)
        raise NotReady("the keys cannot be checked now") from None
