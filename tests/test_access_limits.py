"""How fast a key may go: buckets on a clock of their own, places that never leak, and a day's tokens that are kept."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from app.access import Limits
from app.access.bucket import Bucket
from app.access.key import Key
from app.access.meter import Meter, duration
from app.access.usage import Usage
from app.errors import EngineFailed, NumericalError, Overloaded, RateLimited
from tests.access_harness import NOON, Clock, KeyedHarness
from tests.api_harness import wait_until
from tests.load_harness import live
from tests.raw_http import exchange


def meter(clock: Clock, **limits: int) -> Meter:
    key = Key("key_1", "n", "sk-abcd", "", frozenset(["generate"]), None, "t", Limits(**limits), 0)
    return Meter(key, Usage(now=clock), clock)


def refused(meter: Meter, *, generates: bool = True) -> int | None:
    try:
        meter.admit(generates=generates).leave()
    except RateLimited as error:
        return error.retry_after
    return None


def test_a_bucket_fills_to_its_brim_and_no_further() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.spend(60)
    assert (bucket.level, bucket.seconds_until(1), bucket.seconds_until(60)) == (0, 1, 60)
    clock.now += 0.5
    assert bucket.level == pytest.approx(0.5)
    clock.now += 10_000
    assert bucket.level == 60
    bucket.spend(100)
    assert (bucket.level, bucket.seconds_until(1)) == (-40, 41)


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.floats(0, 200), st.integers(0, 300)), max_size=30),
    st.sampled_from(["requests_per_minute", "tokens_per_minute"]),
)
def test_retry_after_is_true(per_minute: int, steps: list[tuple[float, int]], limit: str) -> None:
    """Who waits as long as told gets in, and who asks two seconds earlier does not."""
    clock = Clock()
    subject = meter(clock, **{limit: per_minute})
    for seconds, amount in steps:
        clock.now += seconds
        if refused(subject) is None:
            subject.spend(amount)
        for _ in range(min(amount, 50)):
            refused(subject)
        wait = refused(subject)
        if wait is not None:
            assert wait >= 1
            before = clock.now
            if wait > 2:
                clock.now = before + wait - 2
                assert refused(subject) is not None
            clock.now = before + wait
            assert refused(subject) is None


def test_each_minute_has_its_requests() -> None:
    clock = Clock()
    subject = meter(clock, requests_per_minute=30)
    got_in = 0
    for _ in range(600 * 10):
        got_in += refused(subject, generates=False) is None
        clock.now += 0.1
    assert got_in == pytest.approx(30 + 10 * 30, abs=1)


def test_a_refused_request_costs_nothing() -> None:
    clock = Clock()
    subject = meter(clock, requests_per_minute=2, max_parallel=1)
    place = subject.admit(generates=True)
    for _ in range(10):
        assert refused(subject) == 1
    place.leave()
    place.leave()
    assert refused(subject) is None, "neither the requests nor the place are gone"
    assert refused(subject) == 30


def test_tokens_hold_up_generation_alone() -> None:
    clock = Clock()
    subject = meter(clock, tokens_per_minute=60, tokens_per_day=1000)
    subject.spend(90)
    assert (refused(subject), refused(subject, generates=False)) == (31, None)
    clock.now += 31
    assert refused(subject) is None
    subject.spend(910)
    clock.now += 3600
    assert refused(subject) == 12 * 3600 - 3600 - 31
    clock.now += 12 * 3600 - 3600 - 31
    assert refused(subject) is None, "a new day"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0ms"),
        (0.0004, "1ms"),
        (0.02, "20ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (60, "1m0s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
    ],
)
def test_durations_as_openai_writes_them(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.fixture
def harness(tmp_path: Path) -> KeyedHarness:
    return KeyedHarness.keyed(tmp_path / "prompts")


@pytest.fixture
def client(harness: KeyedHarness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


def generate(client: TestClient, headers: dict[str, str], **body: Any) -> Any:
    return client.post("/v1/generate", json={"input": "one two", **body}, headers=headers)


def test_requests_a_minute_over_http(harness: KeyedHarness, client: TestClient) -> None:
    headers = harness.key("prompts:read", limits=Limits(requests_per_minute=3))
    other = harness.key("prompts:read", limits=Limits(requests_per_minute=3))
    remaining = []
    for _ in range(3):
        reply = client.get("/v1/tasks", headers=headers)
        assert reply.status_code == 200 and reply.headers["x-ratelimit-limit-requests"] == "3"
        remaining.append((reply.headers["x-ratelimit-remaining-requests"], reply.headers["x-ratelimit-reset-requests"]))
    assert remaining == [("2", "20s"), ("1", "40s"), ("0", "1m0s")]
    reply = client.get("/v1/tasks", headers=headers)
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "20")
    assert reply.headers["x-ratelimit-remaining-requests"] == "0"
    assert reply.json()["error"]["code"] == "rate_limit_exceeded" and "3 requests a minute" in reply.json()["detail"]
    assert client.get("/v1/tasks", headers=other).status_code == 200
    assert client.get("/livez").status_code == 200
    assert client.delete("/v1/tasks/x", headers=headers).status_code == 429, "not even to be told 403"
    harness.clock.now += 18.5
    assert client.get("/v1/tasks", headers=headers).headers["retry-after"] == "2"
    harness.clock.now += 2
    assert client.get("/v1/tasks", headers=headers).status_code == 200


def test_every_limit_is_told(harness: KeyedHarness, client: TestClient) -> None:
    """By a refusal for that limit alone, too."""
    day = harness.key(limits=Limits(tokens_per_day=30))
    while (reply := generate(client, day)).status_code == 200:
        left = 30 - harness.access._usage.of(harness.key_id(day))
        assert reply.headers["x-ratelimit-remaining-tokens-day"] == str(max(0, left))
    assert reply.status_code == 429
    found = {name: reply.headers[f"x-ratelimit-{name}-tokens-day"] for name in ("limit", "remaining", "reset")}
    assert found == {"limit": "30", "remaining": "0", "reset": "12h0m0s"}
    few = harness.key("prompts:read", limits=Limits(max_parallel=2))
    reply = client.get("/v1/tasks", headers=few)
    assert (reply.headers["x-ratelimit-limit-parallel"], reply.headers["x-ratelimit-remaining-parallel"]) == ("2", "1")
    places = [harness.access._meters[harness.key_id(few)].admit(generates=False) for _ in range(2)]
    reply = client.get("/v1/tasks", headers=few)
    assert (reply.status_code, reply.headers["x-ratelimit-remaining-parallel"]) == (429, "0")
    for place in places:
        place.leave()


def test_no_limits_no_headers(harness: KeyedHarness, client: TestClient) -> None:
    reply = client.get("/info", headers=harness.key())
    assert not [name for name in reply.headers if name.startswith("x-ratelimit")]


def test_a_refusal_reads_no_body(harness: KeyedHarness) -> None:
    """Nor does it wait for one: a head is all that is sent."""
    headers = harness.key("admin", limits=Limits(requests_per_minute=1))
    key = f"Authorization: {headers['Authorization']}\r\n"
    with harness.listening() as listening:
        exchange(listening.port, f"GET /info HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{key}\r\n".encode())
        for path in ("/v1/generate", "/v1/tasks/x/versions"):
            for sent, status in ((key, b"429"), ("", b"401")):
                head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
                with socket.create_connection(("127.0.0.1", listening.port), timeout=5) as connection:
                    connection.sendall(f"{head}{sent}\r\n".encode())
                    assert connection.recv(4096).startswith(b"HTTP/1.1 %s " % status)


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_those_of_usage(harness: KeyedHarness, client: TestClient, stream: bool) -> None:
    headers = harness.key(limits=Limits(tokens_per_minute=1000))
    reply = generate(client, headers, stream=stream, n=2)
    events = [line[6:] for line in reply.text.split("\n\n") if line.startswith("data: {")]
    usage = (json.loads(events[-1]) if stream else reply.json())["usage"]
    assert usage["total_tokens"] > usage["completion_tokens"] > 0
    after = client.get("/info", headers=headers).headers
    assert after["x-ratelimit-remaining-tokens"] == str(1000 - usage["total_tokens"])
    if not stream:
        assert reply.headers["x-ratelimit-remaining-tokens"] == after["x-ratelimit-remaining-tokens"]


def test_classification_pays_for_its_text(harness: KeyedHarness, client: TestClient) -> None:
    headers = harness.key(limits=Limits(tokens_per_minute=1000))
    body = {"input": ["one two", "three"], "labels": ["a", "b"]}
    reply = client.post("/v1/classify", json=body, headers=headers)
    left = reply.headers["x-ratelimit-remaining-tokens"]
    assert left == str(1000 - reply.json()["usage"]["total_tokens"])
    harness.engine.refuse = (0, Overloaded("full"))
    reply = client.post("/v1/classify", json=body, headers=headers)
    assert reply.status_code == 503
    assert client.get("/info", headers=headers).headers["x-ratelimit-remaining-tokens"] == left


def test_only_what_was_made_is_paid(harness: KeyedHarness, client: TestClient) -> None:
    headers = harness.key(limits=Limits(tokens_per_minute=1000))

    def left() -> int:
        return int(client.get("/info", headers=headers).headers["x-ratelimit-remaining-tokens"])

    harness.engine.refuse = (1, Overloaded("full"))
    assert generate(client, headers, input=["one two", "three"]).status_code == 503
    assert left() == 1000, "refused before anything ran"
    harness.engine.refuse = None
    harness.engine.endless = True
    harness.engine.fail_after = (5, NumericalError("it broke"))
    assert generate(client, headers).status_code == 500
    assert left() == 1000 - len(harness.tokens("one two")) - 5


ROUTES: dict[str, dict[str, Any]] = {"/v1/generate": {"n": 2}, "/v1/classify": {"labels": ["a", "b"]}}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("how", ["late", "failed", "left"])
def test_what_never_had_its_turn_costs_nothing(harness: KeyedHarness, path: str, how: str) -> None:
    headers = harness.key(limits=Limits(tokens_per_minute=1000))
    body = {"input": ["one two", "three"], **ROUTES[path]}
    harness.engine.delay = 60.0 if how != "failed" else 0.0
    harness.engine.fail_after = (0, EngineFailed("it died")) if how == "failed" else None
    with harness.client() as client:
        if how == "left":
            with harness.listening() as listening:
                connection = listening.post(path, body, headers=headers)
                wait_until(lambda: len(harness.engine.calls) >= 2)
                connection.close()
                wait_until(lambda: all(call.releases for call in harness.engine.calls))
        else:
            timeout = {"X-Request-Timeout": "0.1"} if how == "late" else {}
            assert client.post(path, json=body, headers=headers | timeout).status_code in (500, 504)
        assert client.get("/info", headers=headers).headers["x-ratelimit-remaining-tokens"] == "1000"


def test_of_several_inputs_those_are_paid_that_had_their_turn(harness: KeyedHarness) -> None:
    """On a real engine of one row: the second input, a long one, waits behind the first."""
    headers = harness.key()
    texts = ["the first one", "and another text " * 20]
    first, second = (len(harness.tokens(text)) for text in texts)
    with live(harness.settings.registry, max_num_seqs=1, step_seconds=0.02) as server:
        access = server.listening.server.lifespan.state["server"].access
        body = {"input": texts, "max_tokens": 100, "ignore_eos": True}
        reply = server.ask("POST", "/v1/generate", body, headers={**headers, "X-Request-Timeout": "1"})
        assert reply.status == 504
        spent = access._usage.of(harness.key_id(headers))
        assert first < spent <= first + 100 < second
        server.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_pays_for_what_was_made_and_gives_the_place_back(harness: KeyedHarness, stream: bool) -> None:
    headers = harness.key(limits=Limits(tokens_per_day=10**6, max_parallel=2))
    harness.engine.endless, harness.engine.delay = True, 0.002
    token = headers["Authorization"]
    with harness.listening() as listening:
        for _ in range(6):
            sockets = [
                listening.post("/v1/generate", {"input": "one two", "stream": stream}, headers={"Authorization": token})
                for _ in range(2)
            ]
            wait_until(lambda: sum(call.taken > 5 for call in harness.engine.calls if not call.releases) == 2)
            began = len(harness.engine.calls)
            with listening.post("/v1/generate", {"input": "x"}, headers={"Authorization": token}) as third:
                head = third.recv(4096).decode()
                assert head.startswith("HTTP/1.1 429") and "retry-after: 1" in head.lower()
            for connection in sockets:
                connection.close()
            wait_until(lambda: all(call.releases for call in harness.engine.calls))
            wait_until(lambda: harness.access._meters[harness.key_id(headers)]._inside == 0)
            assert len(harness.engine.calls) == began
        key_id = harness.key_id(headers)
        made = sum(call.taken + len(call.token_ids) for call in harness.engine.calls)
        assert harness.access._usage.of(key_id) == made
    assert harness.access._usage.of(key_id) == made, "written at the end"


def test_places_do_not_leak(harness: KeyedHarness, client: TestClient) -> None:
    """However a request ends."""
    headers = harness.key("admin", limits=Limits(max_parallel=1))
    for _ in range(3):
        client.get("/v1/tasks", headers=headers)
        client.get("/v1/tasks/none", headers=headers)
        client.get("/nowhere", headers=headers)
        client.post("/v1/generate", content=b"{", headers={**headers, "Content-Type": "application/json"})
        client.post("/v1/generate", content=b"{}", headers=headers)
        generate(client, headers, stream=True)
        generate(client, headers, max_tokens=-1)
        generate(client, headers, input="x " * 2000)
        harness.engine.refuse = (0, RuntimeError("a bug"))
        assert generate(client, headers).status_code == 500
        harness.engine.refuse = None
        client.request("PATCH", "/v1/tasks", headers=headers)
        client.options("/v1/generate", headers=headers)
    assert harness.access._meters[harness.key_id(headers)]._inside == 0
    assert client.get("/v1/tasks", headers=headers).status_code == 200


def test_many_at_once(harness: KeyedHarness, client: TestClient) -> None:
    headers = harness.key(limits=Limits(max_parallel=4))
    harness.engine.delay = 0.02
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(generate(client, headers).status_code)) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429} and statuses.count(200) >= 4
    assert generate(client, headers).status_code == 200


def test_a_days_tokens_outlive_the_server(tmp_path: Path) -> None:
    first = KeyedHarness.keyed(tmp_path / "prompts")
    headers = first.key(limits=Limits(tokens_per_day=30))
    with first.client() as client:
        used = 0
        while (reply := generate(client, headers)).status_code == 200:
            used += reply.json()["usage"]["total_tokens"]
        assert used >= 30
        seconds = int(reply.headers["retry-after"])
        assert reply.status_code == 429 and seconds == math.ceil(43_200)
    second = KeyedHarness.keyed(tmp_path / "prompts", clock=first.clock)
    with second.client() as client:
        assert second.access._usage.of(second.key_id(headers)) == used
        assert generate(client, headers).status_code == 429
        assert client.get("/info", headers=headers).status_code == 200
        second.clock.now += seconds
        assert generate(client, headers).status_code == 200


def test_two_servers_share_a_day(tmp_path: Path) -> None:
    first = KeyedHarness.keyed(tmp_path / "prompts")
    headers = first.key(limits=Limits(tokens_per_day=10**6))
    second = KeyedHarness.keyed(tmp_path / "prompts", clock=first.clock)
    key_id = second.key_id(headers)

    async def run() -> None:
        for _ in range(3):
            for harness, tokens in ((first, 5), (second, 7)):
                harness.access._usage.add(key_id, tokens)
                await harness.access.flush()
        await first.access.flush()

    asyncio.run(run())
    assert first.access._usage.of(key_id) == second.access._usage.of(key_id) == 36
    assert first.clock.now == NOON
