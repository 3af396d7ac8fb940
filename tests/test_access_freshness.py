"""What a running server knows of the keys: within two seconds all of it, and never less than before."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.access import Access, AuditEntry, Database, KeyStore, Limits
from app.access.access import FRESH, MAX_STALE, POLL
from app.access.audit import read_audit
from app.access.usage import read_usage
from app.config import Settings
from app.errors import InvalidSettings, NotReady
from app.main import _check_exposure, create_app
from tests.access_harness import Clock, KeyedHarness, bearer
from tests.api_harness import Harness, wait_until


@contextmanager
def broken(harness: KeyedHarness) -> Iterator[None]:
    path = harness.settings.registry / ".softprompt" / "access.db"
    path.rename(path.with_suffix(".away"))
    try:
        yield
    finally:
        path.with_suffix(".away").rename(path)


def status(client: TestClient, headers: dict[str, str]) -> int:
    return client.get("/info", headers=headers).status_code


def test_another_process_opens_closes_and_revokes(tmp_path: Path) -> None:
    """On the real clock, through the database alone."""
    harness = Harness.create(tmp_path / "prompts")
    database = Database.of(Settings(registry=tmp_path / "prompts"))
    with harness.client() as client:
        assert status(client, {}) == 200
        database.prepare()
        key, secret = KeyStore(database).create("first", scopes=["generate"])
        time.sleep(FRESH)
        assert (status(client, {}), status(client, bearer(secret))) == (401, 200)
        KeyStore(database).revoke(key.id)
        time.sleep(FRESH)
        assert (status(client, {}), status(client, bearer(secret))) == (401, 401), "closed for ever"
    with Harness.create(tmp_path / "prompts").client() as client:
        assert status(client, {}) == 401, "a revoked key is a key"


def test_a_request_never_believes_what_is_older_than_two_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the one who polls does not come round to it."""
    monkeypatch.setattr("app.access.access.POLL", 0.0)
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    headers = harness.key("admin")

    async def no_poll(_: object) -> None: ...

    monkeypatch.setattr(harness.access, "_poll", no_poll)
    with harness.client() as client:
        assert status(client, headers) == 200
        harness.store.revoke(harness.key_id(headers))
        _, secret = harness.store.create("new", scopes=["generate"])
        assert (status(client, headers), status(client, bearer(secret))) == (200, 401)
        harness.clock.now += FRESH + 0.01
        assert (status(client, headers), status(client, bearer(secret))) == (401, 200)


@pytest.mark.anyio
async def test_a_machine_that_is_slow_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read takes longer than what was read may be old, and one is under way that began before the request."""
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    access, read, began, go_on = harness.access, harness.access._read, [], threading.Event()

    def slow() -> object:
        began.append(harness.clock.now)
        go_on.wait(20)
        harness.clock.now += FRESH + POLL
        return read()

    monkeypatch.setattr(access, "_read", slow)
    early = asyncio.create_task(access.refresh())
    while not began:
        await asyncio.sleep(0.001)
    harness.clock.now += FRESH + POLL
    asked = asyncio.create_task(access.authenticate(None))
    await asyncio.sleep(0)
    go_on.set()
    assert (await asked).key is None
    await early
    assert len(began) == 2, "the first one began too early to say what holds for this request"


def test_without_the_database_known_keys_go_on_for_a_while(tmp_path: Path) -> None:
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    known = harness.key("admin")
    revoked = harness.key("admin")
    harness.store.revoke(harness.key_id(revoked))
    harness.access.load()
    with harness.client() as client:
        with broken(harness):
            harness.clock.now += FRESH + POLL
            assert status(client, known) == 200
            assert (status(client, {}), status(client, revoked)) == (401, 401)
            reply = client.get("/info", headers=bearer("sk-unknown"))
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
            assert "retry-after" in reply.headers and str(tmp_path) not in reply.text
            harness.clock.now += MAX_STALE
            assert (status(client, known), status(client, {})) == (503, 401)
            assert status(client, revoked) == 401
            assert client.get("/livez").status_code == 200
            assert client.get("/readyz").status_code == 200
        harness.clock.now += FRESH + POLL
        assert (status(client, known), status(client, bearer("sk-unknown"))) == (200, 401)


def test_an_open_server_that_loses_its_database_is_not_open(tmp_path: Path) -> None:
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    harness.database.prepare()
    harness.access.load()
    with harness.client() as client:
        assert status(client, {}) == 200
        with broken(harness):
            harness.clock.now += FRESH + POLL
            assert (status(client, {}), status(client, bearer("sk-x"))) == (503, 503)


def test_the_key_of_the_settings_needs_no_database(tmp_path: Path) -> None:
    api_key = "sk-of-the-settings"
    harness = KeyedHarness.keyed(tmp_path / "prompts", api_key=api_key)
    harness.key()
    with harness.client() as client, broken(harness):
        harness.clock.now += MAX_STALE + 10
        assert status(client, bearer(api_key)) == 200


def test_what_cannot_be_written_is_written_later(tmp_path: Path) -> None:
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    headers = harness.key("admin", limits=Limits(tokens_per_day=10**6))
    with harness.client() as client:
        with broken(harness):
            client.post("/v1/generate", json={"input": "one two"}, headers=headers)
            client.delete("/v1/tasks/none", headers=headers)
            time.sleep(POLL * 1.2)
            assert client.get("/v1/audit", headers=headers).status_code == 503
        assert len(client.get("/v1/audit", headers=headers).json()["data"]) == 1
        used = harness.access._usage.of(harness.key_id(headers))
        assert used > 0
    again = KeyedHarness.keyed(tmp_path / "prompts", clock=harness.clock)
    assert again.access._usage.of(harness.key_id(headers)) == used


def test_what_comes_while_the_last_but_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clean end finds the poll at work, and loses nothing."""
    monkeypatch.setattr("app.access.access.POLL", 0.01)
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    headers = harness.key()
    access, flush = harness.access, harness.access._flush

    async def run() -> None:
        at_work, go_on = asyncio.Event(), asyncio.Event()

        async def slowly() -> None:
            await flush()
            at_work.set()
            await go_on.wait()

        monkeypatch.setattr(access, "_flush", slowly)
        async with access.running():
            await asyncio.wait_for(at_work.wait(), 10)
            access.audit(AuditEntry.now(request_id="late", key_id="k", action="a", target="t", status=403))
            access._usage.add(harness.key_id(headers), 7)
            asyncio.get_running_loop().call_later(0.05, go_on.set)

    asyncio.run(run())
    assert [entry.request_id for entry in read_audit(harness.database, limit=10)] == ["late"]
    with harness.database.reading() as connection:
        assert list(read_usage(connection, access._usage.today).values()) == [7]


def test_when_a_key_was_last_used(tmp_path: Path) -> None:
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    headers = harness.key()
    first = int(harness.clock.now)

    def last_used() -> int | None:
        return harness.store.all()[0].last_used_at

    with harness.client() as client:
        assert last_used() is None
        status(client, headers)
        wait_until(lambda: last_used() == first)
        harness.clock.now += 30
        status(client, headers)
        harness.clock.now += 40
        status(client, headers)
    assert last_used() == first + 70


def test_a_hanging_database_delays_no_other_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    headers = harness.key()
    go_on = threading.Event()
    with harness.client() as client:
        monkeypatch.setattr(harness.store, "read_if_changed", lambda _: None)
        monkeypatch.setattr(harness.access, "_read", lambda: (go_on.wait(20), None)[1:] * 2)
        harness.clock.now += FRESH + POLL
        began = time.monotonic()
        assert status(client, headers) == 200
        assert client.get("/livez").status_code == 200
        assert time.monotonic() - began < 5
        assert client.get("/info", headers=bearer("sk-unknown")).status_code == 503
        go_on.set()


def test_no_start_without_the_database_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(NotReady):
        Access.open(Settings(registry=tmp_path, database="postgresql+psycopg://u:p@127.0.0.1:9/x"))  # type: ignore[arg-type]
    path = tmp_path / "elsewhere" / "keys.db"
    access = Access.open(Settings(registry=tmp_path, database=f"sqlite:///{path}"))  # type: ignore[arg-type]
    assert access.is_open and path.exists()


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.1", "example.org", "localhost.example.org", "::ffff:127.0.0.1"]
)
def test_nobody_listens_beyond_loopback_without_a_key(tmp_path: Path, host: str) -> None:
    settings = Settings(registry=tmp_path / "prompts", host=host)
    with pytest.raises(InvalidSettings, match="softprompt keys create"):
        _check_exposure(settings, Access.open(settings))
    for more in ({"insecure": True}, {"api_key": "sk-0123456789abcdef"}, {"host": "127.0.0.1"}, {"host": "::1"}):
        other = Settings(**{"registry": tmp_path / "prompts", "host": host, **more})  # type: ignore[arg-type]
        _check_exposure(other, Access.open(other))
    database = Database.of(settings)
    database.prepare()
    with pytest.raises(InvalidSettings):
        _check_exposure(settings, Access.open(settings))
    KeyStore(database).create("k", scopes=["generate"])
    _check_exposure(settings, Access.open(settings))


def test_serve_refuses_before_it_loads_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app import main

    monkeypatch.setattr(main, "load_base", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(InvalidSettings, match="there is no key"):
        main.serve(Settings(registry=tmp_path, host="0.0.0.0", port=0))


def test_insecure_is_only_about_having_no_key(tmp_path: Path) -> None:
    plain = Harness.create(tmp_path / "prompts", insecure=True, host="0.0.0.0", api_key="sk-0123456789abcdef")
    with plain.client() as client:
        assert (status(client, {}), status(client, bearer("sk-0123456789abcdef"))) == (401, 200)


def test_create_app_takes_the_settings_keys(tmp_path: Path) -> None:
    plain = Harness.create(tmp_path / "prompts")
    keyed = KeyedHarness.keyed(tmp_path / "prompts", clock=Clock())
    keyed.key()
    with TestClient(create_app(plain.settings, plain.engine, plain.registry, plain.base)) as client:
        assert status(client, {}) == 401
