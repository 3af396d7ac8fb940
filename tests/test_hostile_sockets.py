"""Bytes that no client library would send, over real sockets, and clients that send them slowly."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from app.api.server import max_connections
from tests.api_harness import Harness, Listening, wait_until
from tests.hostile_http import BODY, EXCHANGES, get, post
from tests.raw_http import RawReply, exchange, received, replies


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    harness = Harness.create(tmp_path_factory.mktemp("sockets") / "prompts", receive_timeout=0.5, max_body_bytes=50_000)
    harness.publish("sentiment", labels=["x", "y"])
    return harness


@pytest.fixture(scope="module")
def server(harness: Harness) -> Iterator[Listening]:
    with harness.listening() as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_goes_wrong_inside(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def check(reply: RawReply) -> None:
    """The error body, where it comes from outside the application too."""
    assert reply.headers["content-type"] == "application/problem+json" and reply.body.isascii()
    assert len(reply.body) < 1_000
    if reply.body:
        body = json.loads(reply.body)
        assert body["status"] == reply.status and body["error"]["code"]
        assert body["instance"] == f"urn:softprompt:request:{reply.headers['x-request-id']}"


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanges(server: Listening, name: str) -> None:
    data, expected = EXCHANGES[name]
    found = exchange(server.port, data)
    assert [reply.status for reply in found] == expected
    for reply in found:
        if reply.status >= 400:
            check(reply)
    assert server.get("/v1/tasks/sentiment")[0] == 200, "nobody deleted it"


def slow(port: int, data: bytes, pause: float = 0.05, size: int = 1) -> tuple[list[RawReply], float]:
    """Send `size` bytes at a time until the server closes or all is sent; the replies and the seconds."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found = b""
        for start in range(0, len(data), size):
            try:
                connection.sendall(data[start : start + size])
                connection.settimeout(pause)
                piece = connection.recv(65_536)
                found += piece
                if not piece:
                    break
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                break
        connection.settimeout(10)
        return replies(found + received(connection)), time.monotonic() - began


def test_slow_heads(server: Listening) -> None:
    """However its bytes are spread: each is no progress."""
    for data in (get() * 10, b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 80, b"G"):
        (reply,), seconds = slow(server.port, data)
        assert reply.status == 408 and json.loads(reply.body)["error"]["code"] == "request_timeout"
        assert 0.4 < seconds < 3
        check(reply)


def test_connections_without_a_request(server: Listening) -> None:
    found, seconds = slow(server.port, b"")
    assert not found and 0.4 < seconds < 3


def test_a_second_head_may_not_be_slower(server: Listening) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.8)  # longer than a head may take: a connection that is kept alive has another limit
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost")
        assert [reply.status for reply in replies(received(connection))] == [200, 408]


def test_slow_bodies(server: Listening) -> None:
    length = b"Content-Length: 40000\r\n"
    chunks = b"Transfer-Encoding: chunked\r\n"
    for data in (post(length, b" " * 40_000, extra=b""), post(chunks, b"1\r\n \r\n" * 900, extra=b"")):
        end_of_head = data.index(b"\r\n\r\n") + 4
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(data[:end_of_head])
            began = time.monotonic()
            for byte in data[end_of_head : end_of_head + 250]:
                try:
                    connection.sendall(bytes([byte]))
                except (ConnectionResetError, BrokenPipeError):
                    break
                time.sleep(0.02)
            (reply,) = replies(received(connection))
        assert reply.status == 408 and reply.headers["connection"] == "close" and time.monotonic() - began < 3
        check(reply)


def test_a_body_that_comes_fast_enough_has_more_time(server: Listening) -> None:
    """45 kB in 1.5 seconds, three times the limit: 10 kB a second earn it."""
    data = post(b"Content-Length: 45000\r\n", BODY.ljust(45_000))
    (reply,), seconds = slow(server.port, data, pause=0.05, size=1_500)
    assert reply.status == 200 and seconds > 1.2


def test_a_body_that_nobody_reads_is_cut(server: Listening) -> None:
    """After a refusal the rest is thrown away, but not for ever."""
    head = post(b"Content-Length: 10000000000\r\n", b"", extra=b"")
    for data in (
        head,
        head.replace(b"/v1/generate", b"/v1/nothing1"),
        head.replace(b"POST", b"GET").replace(b"/v1/generate", b"/livez"),
    ):
        found, seconds = slow(server.port, data + b"x" * 10_000, size=100)
        assert [reply.status in (413, 404, 200) for reply in found] == [True]
        assert seconds < 4
    wait_until(lambda: server.num_connections == 0)


def test_a_body_beyond_the_limit_is_not_waited_for(server: Listening) -> None:
    for headers, body in (
        (b"Content-Length: 10000000000\r\n", b"x" * 100),
        (b"Transfer-Encoding: chunked\r\n", b"1000\r\n%s\r\n" % (b"x" * 4096) * 30),
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(post(headers, body, extra=b""))
            began = time.monotonic()
            assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ") and time.monotonic() - began < 0.4


def test_others_are_served_meanwhile(harness: Harness, server: Listening) -> None:
    """300 slow clients, half in their heads, half in their bodies."""

    def waits() -> list[float]:
        seconds = []
        for _ in range(20):
            began = time.monotonic()
            (reply,) = exchange(server.port, post(b"Content-Length: %d\r\n" % len(BODY)))
            assert reply.status == 200
            seconds.append(time.monotonic() - began)
        return sorted(seconds)

    alone = waits()  # a machine that does other things as well is slow with nobody else here
    head = post(b"Content-Length: 1000\r\n", b"{", extra=b"")
    with ExitStack() as stack:
        connections = []
        for number in range(300):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            connections.append(stack.enter_context(connection))
            connection.sendall(head if number % 2 else head[:40])
        assert waits()[18] < max(0.5, 10 * alone[18])
        for connection in connections:
            assert [reply.status for reply in replies(received(connection))] == [408]
    wait_until(lambda: server.num_connections == 0)
    assert harness.num_pins == 0


def test_connections_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is told so; those that are there go on."""
    assert 16 <= max_connections() <= 10_000
    monkeypatch.setattr("app.api.server.max_connections", lambda: 3)
    harness = Harness.create(tmp_path / "prompts", receive_timeout=5.0)
    with harness.listening() as server:
        held = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(3)]
        wait_until(lambda: server.num_connections == 3)
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            (reply,) = replies(received(connection))
            assert reply.status == 503 and json.loads(reply.body)["error"]["code"] == "overloaded"
        held[0].sendall(get())
        assert [reply.status for reply in replies(received(held[0]))] == [200]
        for connection in held:
            connection.close()
        wait_until(lambda: server.num_connections == 0)
        assert server.get("/livez")[0] == 200


def test_many_at_once(server: Listening) -> None:
    """Every kind of nonsense from four threads."""
    wrong: list[str] = []

    def work() -> None:
        for name, (data, expected) in EXCHANGES.items():
            if len(data) < 100_000 and [reply.status for reply in exchange(server.port, data)] != expected:
                wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert server.get("/v1/tasks/sentiment")[0] == 200
