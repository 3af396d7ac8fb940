"""Real sockets, because nothing else shows a client that leaves or stalls; and the drain."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from app.api.server import bind
from app.errors import InvalidSettings
from tests.api_harness import Harness, Listening, events, read_stream, wait_until
from tests.raw_http import received, replies

GENERATE = {"task": "sentiment", "input": ["a", "b"], "max_tokens": 100_000}


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    harness = Harness.create(tmp_path / "prompts", send_timeout=0.4)
    harness.publish("sentiment", labels=["x", "y"])
    return harness


@pytest.fixture
def server(harness: Harness) -> Iterator[Listening]:
    with harness.listening() as server:
        yield server


def leave(connection: socket.socket, how: str) -> None:
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("delay", [0.005, 60.0], ids=["generating", "waiting for the first token"])
def test_a_client_that_leaves(harness: Harness, server: Listening, how: str, streamed: bool, delay: float) -> None:
    harness.engine.endless = True
    harness.engine.delay = delay
    connection = server.post("/v1/generate", {**GENERATE, "stream": streamed})
    wait_until(lambda: len(harness.engine.calls) == 2)
    if delay < 1:
        wait_until(lambda: harness.engine.calls[1].taken > 3)
    assert harness.num_pins == 1 and not harness.engine.calls[0].closed
    leave(connection, how)
    wait_until(lambda: all(call.closed for call in harness.engine.calls))
    assert [call.releases for call in harness.engine.calls] == [1, 1]
    assert harness.num_pins == 0
    wait_until(lambda: server.num_connections == 0)


@pytest.mark.parametrize("more", [b"\r\n", b"G", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 20])
@pytest.mark.parametrize(("streamed", "upgrade"), [(False, {}), (True, {}), (False, {"Upgrade": "h2c"})])
def test_a_client_that_leaves_having_sent_more(
    harness: Harness, server: Listening, streamed: bool, upgrade: dict[str, str], more: bytes
) -> None:
    """A stray line end, or the begin of its next request, hides nothing, behind an offer to upgrade either."""
    harness.engine.delay = 60.0
    connection = server.post("/v1/generate", {**GENERATE, "stream": streamed}, headers=upgrade)
    wait_until(lambda: len(harness.engine.calls) == 2)
    connection.sendall(more)
    time.sleep(0.05)
    assert not harness.engine.calls[0].closed
    connection.close()
    wait_until(lambda: all(call.closed for call in harness.engine.calls))
    wait_until(lambda: server.num_connections == 0)
    assert harness.num_pins == 0


def test_a_client_that_sends_and_sends(harness: Harness, server: Listening) -> None:
    """What is behind a request waits for its reply, but not without end."""
    harness.engine.delay = 60.0
    with server.post("/v1/generate", GENERATE) as connection:
        wait_until(lambda: len(harness.engine.calls) == 2)
        with suppress(ConnectionError):
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 10_000)
        (reply,) = replies(received(connection))
    assert reply.status == 400 and b'"invalid_http"' in reply.body
    wait_until(lambda: all(call.closed for call in harness.engine.calls))


def test_a_client_that_leaves_while_labels_are_scored(harness: Harness, server: Listening) -> None:
    harness.engine.delay = 60.0
    connection = server.post("/v1/classify", {"task": "sentiment", "input": ["a", "b"]})
    wait_until(lambda: len(harness.engine.calls) == 2)
    connection.close()
    wait_until(lambda: all(call.closed for call in harness.engine.calls))
    assert [call.releases for call in harness.engine.calls] == [1, 1] and harness.num_pins == 0


def test_a_client_that_leaves_within_its_body(harness: Harness, server: Listening) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        wait_until(lambda: server.num_connections == 1)
    wait_until(lambda: server.num_connections == 0)
    assert server.get("/livez")[0] == 200
    assert not harness.engine.calls


def test_a_client_that_stalls(harness: Harness, server: Listening) -> None:
    """Its generations end after send_timeout, and others do not notice."""
    harness.engine.endless = True
    with server.post("/v1/generate", {**GENERATE, "stream": True}, receive_buffer=4096):
        wait_until(lambda: len(harness.engine.calls) == 2)
        harness.engine.endless = False
        other = read_stream(server.post("/v1/generate", {"input": "x", "max_tokens": 3, "stream": True}))
        assert len(events(other)) >= 3
        wait_until(lambda: all(call.closed for call in harness.engine.calls[:2]))
        assert [call.releases for call in harness.engine.calls] == [1, 1, 1] and harness.num_pins == 0


def test_the_connection_of_a_client_that_stalls(harness: Harness) -> None:
    """Without the kernel's help it would stay for as long as the client does."""
    harness.engine.endless = True
    with harness.listening(stall_timeout=0.5) as server:
        with server.post("/v1/generate", {**GENERATE, "stream": True}, receive_buffer=4096):
            wait_until(lambda: len(harness.engine.calls) == 2)
            wait_until(lambda: server.num_connections == 0)


@pytest.fixture
def large(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> int:
    """A task whose plain replies fit into no buffer of the kernel; bytes a second of who is slow."""
    monkeypatch.setattr("app.api.protocol.MIN_RATE", 100_000)
    harness.publish("large", labels=[f"{number:0200}" for number in range(1_000)])
    return 100_000


# Of the one the transport has more than the 64 KiB of which it tells, of the other less.
@pytest.mark.parametrize(("path", "size"), [("/v1/tasks/large/versions/1", 200_000), ("/v1/tasks/medium", 40_000)])
@pytest.mark.parametrize("kept", [False, True])
def test_who_takes_a_reply_byte_by_byte_is_cut(
    harness: Harness, server: Listening, large: int, path: str, size: int, kept: bool
) -> None:
    """Each of its bytes is acknowledged, so that the kernel sees nothing wrong."""
    harness.publish("medium", labels=[f"{number:0200}" for number in range(200)])
    path = path if "large" in path else f"{path}/versions/1"
    with connect(server.port, 4096) as connection:
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\n" + ("" if kept else "Connection: close\r\n")
        connection.sendall(head.encode() + b"\r\n")
        began, taken = time.monotonic(), 0
        while server.num_connections or not taken:
            assert time.monotonic() - began < 0.4 + size / large + 5
            taken += len(connection.recv(1))
            time.sleep(0.02)
        assert 0.3 < time.monotonic() - began and taken < 1_000


def test_who_takes_a_reply_slowly_gets_all_of_it(server: Listening, large: int) -> None:
    """In more time than a part of a stream has, and then the next one on the same connection."""
    with connect(server.port, 4096) as connection:
        for _ in range(2):
            connection.sendall(b"GET /v1/tasks/large/versions/1 HTTP/1.1\r\nHost: x\r\n\r\n")
            found, began = b"", time.monotonic()
            reply = http.client.HTTPResponse(connection)
            reply.begin()
            while piece := reply.read(4096):
                found += piece
                time.sleep(4096 / large / 2)
            assert reply.status == 200 and len(json.loads(found)["labels"]) == 1_000
            assert time.monotonic() - began > 0.6
        assert server.num_connections == 1


def connect(port: int, receive_buffer: int) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", port))
    return connection


def test_a_huge_head_is_refused(server: Listening) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nX: " + b"a" * 80_000)
        assert connection.recv(65536).startswith(b"HTTP/1.1 4")


def test_drain(harness: Harness) -> None:
    """Readiness falls while new requests are still taken; what is in flight finishes; then the server ends."""
    harness.engine.delay = 0.05
    with harness.listening(drain_delay=1.5) as server:
        assert server.get("/readyz")[0] == 200
        stream = server.post("/v1/generate", {"task": "sentiment", "input": "a", "stream": True})
        wait_until(lambda: len(harness.engine.calls) == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        status, body = server.get("/readyz")
        assert status == 503 and "server: draining" in body and "not_ready" in body
        assert '"finish_reason":"stop"' in read_stream(stream)
        server.thread.join(10.0)
        assert not server.thread.is_alive()
        with pytest.raises(ConnectionRefusedError):
            server.get("/readyz")
    assert harness.engine.stopped == 1, "the lifespan stops the engine"


def test_what_outlives_the_drain_gets_an_error_event(harness: Harness) -> None:
    harness.engine.endless = True
    harness.engine.delay = 0.01
    with harness.listening(drain_timeout=0.3) as server:
        stream = server.post("/v1/generate", {**GENERATE, "stream": True})
        wait_until(lambda: len(harness.engine.calls) == 2)
        server.server.handle_exit(signal.SIGTERM, None)
        text = read_stream(stream)
        assert '"code":"not_ready"' in text and "data: [DONE]\n\n" in text
        server.thread.join(10.0)
        assert not server.thread.is_alive()
    assert [call.releases for call in harness.engine.calls] == [1, 1] and harness.num_pins == 0


def test_an_address_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: Any = taken.getsockname()[1]
        with pytest.raises(InvalidSettings, match=f"127.0.0.1 port {port}: Address already in use"):
            bind("127.0.0.1", port, stall_timeout=1.0)


def test_a_server_whose_engine_has_given_up_ends(tmp_path: Path) -> None:
    harness = Harness.create(tmp_path / "prompts")
    with harness.listening() as listening:
        assert listening.get("/livez")[0] == 200
        harness.engine.given_up = True
        listening.thread.join(timeout=10)
        assert not listening.thread.is_alive()
