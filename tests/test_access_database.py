"""The database of keys, on SQLite and, where it is installed, on PostgreSQL."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from app.access import Access, AuditEntry, Database, KeyStore, Limits, tables
from app.access.audit import MAX_UNWRITTEN, AuditQueue, read_audit, write_audit
from app.access.usage import KEPT_DAYS, Usage, read_usage, write_usage
from app.config import Settings
from app.errors import InvalidRequest, InvalidSettings, NotReady
from tests.access_harness import Clock

KINDS = ["sqlite", "postgresql"]


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a server of its own, as a user that is not root, which PostgreSQL refuses."""
    if shutil.which("initdb") is None or shutil.which("postgres") is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    prefix = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
    if prefix and shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL refuses root, and there is no setpriv")
    # Short: the path of a socket has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    folder.chmod(0o777)
    made = subprocess.run(
        [*prefix, "initdb", "-D", folder / "data", "-U", "keys", "-A", "trust", "-N"], capture_output=True
    )
    if made.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"initdb failed: {made.stderr.decode()[-200:]}")
    options = ["-c", "listen_addresses=", "-c", "fsync=off", "-k", folder]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*prefix, "postgres", "-D", folder / "data", *options], stderr=log, stdout=log)
    url = f"postgresql+psycopg://keys@/postgres?host={folder}"
    try:
        for _ in range(100):
            with suppress(NotReady), closing(Database(url)) as database, database.reading():
                break
            time.sleep(0.1)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/odd ?#%name/keys.db"
    found: str = request.getfixturevalue("postgres")
    engine = sa.create_engine(found)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    engine.dispose()
    return found


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database(url)
    database.prepare()
    yield database
    database.close()


def test_migrations_make_the_tables_and_do_so_once(database: Database) -> None:
    KeyStore(database).create("kept", scopes=["generate"])
    database.prepare()
    assert [key.name for key in KeyStore(database).all()] == ["kept"]
    with database.writing() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []


def test_processes_that_start_at_once(url: str) -> None:
    script = (
        "import sys; from app.access import Database, KeyStore; d = Database(sys.argv[1]); print(flush=True);"
        "sys.stdin.readline(); d.prepare(); KeyStore(d).create('k', scopes=['generate'])"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        for _ in range(3)
    ]
    for process in started:
        assert process.stdout is not None and process.stdout.readline()
        process.stdout.close()
    for process in started:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
    assert [process.wait(60) for process in started] == [0] * 3
    with closing(Database(url)) as database:
        number, keys = KeyStore(database).read_if_changed(None)
    assert (number, len(keys or [])) == (3, 3)


def test_a_newer_database_is_left_alone(database: Database) -> None:
    with database.writing() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(InvalidSettings, match="another version"):
        database.prepare()


def test_a_key_comes_back_as_it_was_made(database: Database) -> None:
    clock = Clock()
    store = KeyStore(database, now=clock)
    limits = Limits(1, 2, 3, 4)
    made, secret = store.create(
        "näme", scopes=["generate", "jobs"], tasks=["a*", "b"], tenant="t", limits=limits, expires_in=60
    )
    plain, _ = store.create("plain", scopes=["admin"])
    assert {key.id: key for key in store.all()} == {made.id: made, plain.id: plain}
    assert made.prefix == secret[:7] and made.expires_at == made.created_at + 60
    assert plain.tenant == plain.id and plain.tasks is None and plain.limits == Limits()
    number, _ = store.read_if_changed(None)
    assert store.read_if_changed(number) == (number, None)
    assert store.revoke(made.id) and not store.revoke("key_none")
    first = clock.now
    clock.now += 100
    assert store.revoke(made.id)
    assert store.read_if_changed(number)[0] > number
    store.touch({plain.id: 7, "key_none": 8})
    assert {key.name: (key.revoked_at, key.last_used_at) for key in store.all()} == {
        "näme": (first, None),
        "plain": (None, 7),
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "x" * 201},
        {"name": "a\nb"},
        {"scopes": []},
        {"scopes": ["generate", "root"]},
        {"tasks": []},
        {"tasks": [""]},
        {"tasks": ["x"] * 101},
        {"tenant": ""},
        {"limits": Limits(requests_per_minute=0)},
        {"limits": Limits(tokens_per_day=-1)},
        {"limits": Limits(max_parallel=2**53)},
        {"expires_in": 0},
        {"expires_in": 1e12},
    ],
)
def test_what_makes_no_key(tmp_path: Path, wrong: dict[str, Any]) -> None:
    database = Database(f"sqlite:///{tmp_path}/keys.db")
    database.prepare()
    with pytest.raises(InvalidRequest):
        KeyStore(database).create(**{"name": "n", "scopes": ["generate"], **wrong})
    assert KeyStore(database).all() == []


def test_usage_adds_up_and_old_days_go(database: Database) -> None:
    key, _ = KeyStore(database).create("k", scopes=["generate"])
    assert write_usage(database, Counter(), 100) == {}
    for _ in range(3):
        assert write_usage(database, Counter({(key.id, 100): 5, (key.id, 99): 1}), 100)[key.id] % 5 == 0
    with database.reading() as connection:
        assert read_usage(connection, 100) == {key.id: 15} and read_usage(connection, 99) == {key.id: 3}
    write_usage(database, Counter({(key.id, 101 + KEPT_DAYS): 1}), 101 + KEPT_DAYS)
    with database.reading() as connection:
        assert read_usage(connection, 100) == {} and read_usage(connection, 101 + KEPT_DAYS) == {key.id: 1}


def test_usage_that_cannot_be_written_is_kept() -> None:
    clock = Clock()
    usage = Usage(now=clock)
    usage.add("a", 5)
    assert usage.take() == {("a", usage.today): 5}
    usage.add("a", 2)
    assert usage.of("a") == 7
    usage.give_back()
    assert usage.of("a") == 7 and usage.take() == {("a", usage.today): 7}
    usage.written(usage.today, {"a": 107})
    assert usage.of("a") == 107
    clock.now += 86_400
    assert usage.of("a") == 0


def entry(number: int, status: int = 200) -> AuditEntry:
    return AuditEntry.now(request_id=f"r{number}", key_id="k", action="a", target="t" * 1000, status=status)


def test_the_audit_log_is_bounded_and_refusals_push_no_change_out(database: Database) -> None:
    write_audit(database, [], keep=3)
    for number in range(5):
        write_audit(database, [entry(number), entry(100 + number, 403)], keep=3)
    write_audit(database, [entry(200 + number, 403) for number in range(50)], keep=3)
    found = read_audit(database, limit=100)
    assert [row.request_id for row in found if row.status == 200] == ["r4", "r3", "r2"]
    assert [row.request_id for row in found if row.status == 403] == ["r249", "r248", "r247"]
    assert all(len(row.target) == 300 for row in found)
    newest, *rest = [row.id for row in found]
    assert [row.id for row in read_audit(database, limit=2, before=newest)] == rest[:2]


def test_targets_can_be_stored_and_printed(database: Database) -> None:
    sent = "a\x00b\x1b[31m\r\n\u202e\u0085\\é 漢\ud800" + "\x00" * 1000
    noted = AuditEntry.now(request_id="r", key_id="k", action="a", target=sent, status=404)
    write_audit(database, [noted], keep=10)
    (found,) = read_audit(database, limit=10)
    assert found.target == noted.target and found.target.isprintable() and len(found.target) == 300
    assert found.target.startswith(r"a\x00b\x1b[31m\r\n\u202e\x85" + "\\é 漢" + r"\ud800\x00\x00")


def test_an_entry_that_the_database_refuses_keeps_no_other_out(
    database: Database, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    bad = AuditEntry("bad", "k", "a", "a\x00b", 404, 1)
    if "sqlite" in request.node.callspec.id:  # which takes that, so it is made to refuse what is long
        bad = AuditEntry("bad", "k", "a", "b" * 5_000, 404, 1)
        sa.event.listen(
            database._engine, "connect", lambda connection, _: connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 2_000)
        )
    write_audit(database, [entry(1), bad, entry(2, 403)], keep=10)
    assert [row.request_id for row in read_audit(database, limit=10)] == ["r2", "r1"]
    assert "request bad" in caplog.text


def test_the_audit_queue_is_bounded() -> None:
    queue = AuditQueue()
    for number in range(MAX_UNWRITTEN + 5):
        queue.add(entry(number))
    taken = queue.take()
    assert len(taken) == MAX_UNWRITTEN and taken[0].request_id == "r5"
    queue.add(entry(-1))
    queue.give_back(taken)
    again = queue.take()
    assert len(again) == MAX_UNWRITTEN and (again[0].request_id, again[-1].request_id) == ("r6", "r-1")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "no URL"),
        ("unknown://user:sesame@host/db", "no URL"),
        ("postgresql+psycopg://user:sesame@host:port/db", "no URL"),
        ("postgresql+psycopg://user:with:sesame@host:5432sesame/db", "no URL"),
        ("sqlite://", "must be a file"),
        ("sqlite:///:memory:", "must be a file"),
        ("mysql+pymysql://me:sesame@localhost/db", "needs the Python package pymysql"),
    ],
)
def test_urls_that_name_no_database(url: str, message: str) -> None:
    with pytest.raises(InvalidSettings, match=message) as caught:
        Database(url)
    assert "sesame" not in caught.value.message


def test_a_server_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    database = Database("postgresql+psycopg://me:sesame@127.0.0.1:9/keys")
    with pytest.raises(NotReady) as caught:
        database.prepare()
    assert "sesame" not in caplog.text + caught.value.message and "127.0.0.1" not in caught.value.message


def test_a_file_that_cannot_be_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is not the same as a file that is not there, which makes an open server."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    look = os.stat

    def forbidden(path: Any, **options: Any) -> os.stat_result:
        if "forbidden" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path, **options)

    monkeypatch.setattr(os, "stat", forbidden)
    for folder in (loop, tmp_path / ("x" * 300), tmp_path / "forbidden"):
        settings = Settings(registry=folder)
        with pytest.raises(NotReady) as caught:
            _ = Database.of(settings).exists
        assert str(tmp_path) not in caught.value.message
        with pytest.raises(NotReady):
            Access.open(settings)
    assert not Database.of(Settings(registry=tmp_path / "none")).exists
    (tmp_path / "file").write_bytes(b"")
    assert not Database.of(Settings(registry=tmp_path / "file")).exists


def test_files_of_sqlite(tmp_path: Path) -> None:
    database = Database.of(Settings(registry=tmp_path / "new" / "prompts"))
    assert not database.exists
    with pytest.raises(NotReady), database.reading():
        pass
    assert not database.exists, "only `prepare` makes the file"
    old = os.umask(0)
    try:
        database.prepare()
    finally:
        os.umask(old)
    path = tmp_path / "new" / "prompts" / ".softprompt" / "access.db"
    assert database.exists and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.write_bytes(b"this is no database")
    with pytest.raises(NotReady):
        database.prepare()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidSettings, match="cannot be made"):
        Database(f"sqlite:///{tmp_path}/file/keys.db").prepare()
