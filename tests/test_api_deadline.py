"""What is not ready in time is given up: in the queue, while the model runs, in a thread, before and after headers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.constraint import ConstraintCompiler
from tests.api_harness import Harness, events, wait_until
from tests.load_harness import Live, live

ROUTES = {
    "generate": ("/v1/generate", {"task": "sentiment", "input": ["a", "b"]}),
    "classify": ("/v1/classify", {"task": "sentiment", "input": ["a", "b"]}),
}


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    harness = Harness.create(tmp_path / "prompts", request_timeout=5.0)
    harness.publish("sentiment", labels=["x", "y"])
    return harness


@pytest.fixture
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


def after(seconds: float | str) -> dict[str, str]:
    return {"X-Request-Timeout": str(seconds)}


@pytest.mark.parametrize("route", ROUTES)
def test_a_reply_that_is_not_ready(harness: Harness, client: TestClient, route: str) -> None:
    harness.engine.delay = 60.0
    path, body = ROUTES[route]
    reply = client.post(path, json=body, headers=after(0.1))
    assert reply.status_code == 504 and reply.json()["error"]["code"] == "deadline_exceeded"
    assert [call.releases for call in harness.engine.calls] == [1, 1]
    assert all(call.closed for call in harness.engine.calls) and harness.num_pins == 0


@pytest.mark.parametrize("route", ROUTES)
def test_a_reply_that_is_ready(client: TestClient, route: str) -> None:
    path, body = ROUTES[route]
    assert client.post(path, json=body, headers=after(5)).status_code == 200


def test_the_servers_own_limit_holds_without_the_header(tmp_path: Path) -> None:
    harness = Harness.create(tmp_path / "prompts", request_timeout=0.1)
    harness.engine.delay = 60.0
    with harness.client() as client:
        assert client.post("/v1/generate", json={"input": "a"}).status_code == 504
        reply = client.post("/v1/generate", json={"input": "a"}, headers=after(0.2))
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "X-Request-Timeout")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e999", "soon", "", "5.1"])
def test_what_is_no_time_limit(harness: Harness, client: TestClient, value: str) -> None:
    for path, body in ROUTES.values():
        reply = client.post(path, json=body, headers=after(value))
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "X-Request-Timeout")
    assert not harness.engine.calls


def test_a_stream_that_has_begun_gets_an_event(harness: Harness, client: TestClient) -> None:
    harness.engine.endless = True
    harness.engine.delay = 0.02
    _, body = ROUTES["generate"]
    reply = client.post("/v1/generate", json={**body, "stream": True}, headers=after(0.3))
    *pieces, last = events(reply.text)
    assert reply.status_code == 200 and len(pieces) > 2 and last["error"]["code"] == "deadline_exceeded"
    assert [call.releases for call in harness.engine.calls] == [1, 1] and harness.num_pins == 0


def test_a_pin_that_is_taken_too_late_is_given_back(
    harness: Harness, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread cannot be interrupted, and what it returns must not be lost."""
    pin, taken = harness.registry.pin, []

    def slowly(reference: str, **user: Any) -> Any:
        time.sleep(0.3)
        taken.append(pin(reference, **user))
        return taken[-1]

    monkeypatch.setattr(harness.registry, "pin", slowly)
    monkeypatch.setattr(harness.registry, "pin_in_memory", lambda _: None)
    for path, body in ROUTES.values():
        assert client.post(path, json=body, headers=after(0.05)).status_code == 504
    wait_until(lambda: len(taken) == len(ROUTES))
    wait_until(lambda: harness.num_pins == 0)
    assert not harness.engine.calls


def test_a_request_that_waits_for_a_thread(
    harness: Harness, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One schema is compiled at a time; whoever waits for its turn does not wait longer than it said."""
    compiling, go_on = threading.Event(), threading.Event()

    def slow(*_: Any) -> Any:
        compiling.set()
        go_on.wait(10)
        raise RuntimeError("nobody waits for this")

    monkeypatch.setattr(ConstraintCompiler, "json_schema", slow)
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "title": "x"}}}
    body = {"task": "sentiment", "input": "a", "response_format": schema}
    first = threading.Thread(target=client.post, args=("/v1/generate",), kwargs={"json": body})
    first.start()
    try:
        assert compiling.wait(10)
        start = time.monotonic()
        assert client.post("/v1/generate", json=body, headers=after(0.1)).status_code == 504
        assert time.monotonic() - start < 5
    finally:
        go_on.set()
        first.join()
    wait_until(lambda: harness.num_pins == 0)


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Live]:
    """A real engine of two rows and slow steps."""
    with live(tmp_path / "prompts", max_num_seqs=2, step_seconds=0.02) as server:
        server.publish("mood", 0, labels=["x", "y"])
        yield server


@pytest.mark.parametrize("streamed", [False, True])
def test_waiting_in_the_queue_counts(busy: Live, streamed: bool) -> None:
    body = {"task": "mood", "input": ["a", "b"], "max_tokens": 400, "ignore_eos": True}
    running = busy.listening.post("/v1/generate", {**body, "stream": True})
    wait_until(lambda: busy.engine.stats().running == 2)
    late = busy.ask("POST", "/v1/generate", {**body, "stream": streamed}, headers=after(0.3))
    assert late.status == (200 if streamed else 504) and b"deadline_exceeded" in late.body
    wait_until(lambda: busy.engine.stats().waiting == 0)
    assert busy.engine.stats().running == 2 and busy.num_pins == 1, "the others go on"
    scored = busy.ask("POST", "/v1/classify", {"task": "mood", "input": "a"}, headers=after(0.3))
    assert scored.status == 504
    wait_until(lambda: busy.engine.stats().waiting == 0)
    running.close()
    busy.assert_idle()


def test_what_is_late_is_no_longer_computed(busy: Live) -> None:
    body = {"task": "mood", "input": ["a", "b"], "max_tokens": 400, "ignore_eos": True, "stream": True}
    reply = busy.ask("POST", "/v1/generate", body, headers=after(0.5))
    assert events(reply.body.decode())[-1]["error"]["code"] == "deadline_exceeded"
    busy.assert_idle()
    assert busy.engine.stats().steps < 200, "of 400 and more"
