"""Whatever a disk or a lock holds up, a prompt that is in memory is served on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.registry import Registry, Store
from tests.api_harness import Harness, files

HELD_UP = 64  # requests: more than there are threads by default
BODY = {"task": "warm", "input": "x"}


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    harness = Harness.create(tmp_path / "prompts")
    for number, task in enumerate(("warm", "cold"), 1):
        harness.publish(task, number / 10)
    harness.registry.pin("warm").release()
    return harness


@pytest.fixture
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


class Hanging:
    """A method that returns to nobody until it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)
        self.reached, self.go_on = threading.Semaphore(0), threading.Event()

        def method(*args: Any, **arguments: Any) -> Any:
            self.reached.release()
            assert self.go_on.wait(60)
            return original(*args, **arguments)

        monkeypatch.setattr(owner, name, method)


REQUESTS: list[tuple[type, str, int, Callable[[TestClient], Any]]] = [
    (Store, "append", 1, lambda client: client.post("/v1/tasks/warm/versions", files=files(0.9))),
    (Store, "read_entry", 8, lambda client: client.get("/v1/tasks/warm/history")),
    (Registry, "move_alias", 8, lambda client: client.put(
        "/v1/tasks/warm/aliases/prod", json={"version": 1}, headers={"if-none-match": "*"})),
    (Registry, "read_file", 8, lambda client: client.get("/v1/tasks/warm/versions/1/files/manifest.json")),
    (Registry, "restore_version", 8, lambda client: client.post("/v1/tasks/warm/versions/1:restore")),
    (Registry, "pin", 32, lambda client: client.post("/v1/generate", json={"task": "cold", "input": "x"})),
    (Registry, "refresh", 1, lambda client: client.get("/livez")),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name", "most", "request_"), REQUESTS, ids=[name for _, name, *_ in REQUESTS])
def test_what_hangs_holds_up_only_its_own(
    harness: Harness,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    most: int,
    request_: Callable[[TestClient], Any],
) -> None:
    hanging = Hanging(monkeypatch, owner, name)
    with harness.client() as client, ThreadPoolExecutor(HELD_UP) as threads:
        replies = [threads.submit(request_, client) for _ in range(HELD_UP)]
        try:
            for _ in range(most):
                assert hanging.reached.acquire(timeout=60)
            for _ in range(3):
                reply = client.post("/v1/generate", json=BODY, headers={"X-Request-Timeout": "20"})
                assert reply.status_code == 200, reply.text
            assert not hanging.reached.acquire(timeout=0.1), "more threads than it may have"
        finally:
            hanging.go_on.set()
        # Of uploads at once all but a few are refused.
        refused = [reply.result(60) for reply in replies if reply.result().status_code >= 500]
        assert all(reply.json()["error"]["code"] == "overloaded" for reply in refused)


def test_a_prompt_in_memory_needs_no_thread(
    harness: Harness, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pin(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(harness.registry, "pin", pin)
    for body in (BODY, BODY | {"task": "warm:1"}):
        assert client.post("/v1/generate", json=body).json()["version"] == 1
    assert harness.num_pins == 0


@pytest.mark.parametrize("task", ["warm", "cold"])
def test_a_reference_is_resolved_once(
    harness: Harness, client: TestClient, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Of a canary, a second draw would give the versions that are in memory more than their share."""
    resolve, seen = harness.registry.resolve, []

    def count(reference: str, **user: Any) -> Any:
        seen.append(reference)
        return resolve(reference, **user)

    monkeypatch.setattr(harness.registry, "resolve", count)
    assert client.post("/v1/generate", json=BODY | {"task": task}).status_code == 200
    assert seen == [task] and harness.num_pins == 0


def test_a_version_that_goes_while_its_request_waits(
    harness: Harness, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name stands for another by then."""
    registry, pin = harness.registry, harness.registry.pin

    def late(reference: str, **arguments: Any) -> Any:
        harness.publish("cold", 0.7)
        registry.delete_version("cold", 1)
        registry.collect(retention=0)
        return pin(reference, **arguments)

    monkeypatch.setattr(registry, "pin", late)
    assert client.post("/v1/generate", json=BODY | {"task": "cold"}).json()["version"] == 2
    assert harness.num_pins == 0
