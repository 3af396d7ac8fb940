"""Clients that leave: at any byte of the request, in the queue, while the model reads or writes, at the last chunk."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.api_harness import wait_until
from tests.load_harness import Live, live

TASK = "mood"
NUM_CLIENTS = 16
STEP_SECONDS = 0.003
LONG_TEXT = "and another text over and over " * 9  # a prompt of several steps
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "array", "items": {"type": "integer"}}}}


def request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    task = rng.choice([TASK, "other", None])
    text = rng.choice(["x", "the first one", LONG_TEXT])
    body: dict[str, Any] = {"task": task, "input": rng.choice([text, ["a", text, "b"]])}
    if rng.random() < 0.25:
        return "/v1/classify", body | {"labels": ["positive", "negative", "on"]}
    body |= {"max_tokens": rng.choice([1, 8, 60]), "n": rng.choice([1, 1, 3]), "stream": rng.random() < 0.6}
    body |= {"ignore_eos": True, "temperature": 0.7, "seed": rng.randrange(100)}
    if rng.random() < 0.1:
        body |= {"response_format": SCHEMA}
    return "/v1/generate", body


def come_and_leave(port: int, rng: random.Random) -> str:
    """Send a request, go at some point; where that was."""
    path, body = request(rng)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    whole = head.encode() + data
    point = rng.choice(["in the request", "at once", "after a while", "within the reply", "at the last chunk"])
    with socket.socket() as connection, suppress(ConnectionError):
        connection.settimeout(60)
        connection.connect(("127.0.0.1", port))
        if point == "in the request":
            connection.sendall(whole[: rng.randrange(len(whole))])
        else:
            connection.sendall(whole)
        if point == "after a while":
            time.sleep(rng.random() * 0.15)
        elif point == "within the reply":
            connection.recv(rng.randrange(1, 2_000))
        elif point == "at the last chunk":
            seen = b""
            while part := connection.recv(65_536):
                seen = seen[-20:] + part
                if b"[DONE]" in seen or not body.get("stream"):
                    break
        how = rng.choice(["fin", "reset", "half"])
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif how == "half":
            connection.shutdown(socket.SHUT_WR)
            time.sleep(rng.random() * 0.02)
    return f"{point}, {how}"


def storm(server: Live, count: int, seed: int) -> dict[str, int]:
    """How many left where."""
    places: dict[str, int] = {}
    problems: list[str] = []
    lock = threading.Lock()

    def leave_often(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        try:
            for _ in range(count // NUM_CLIENTS + (number < count % NUM_CLIENTS)):
                place = come_and_leave(server.port, rng)
                with lock:
                    places[place] = places.get(place, 0) + 1
        except Exception as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=leave_often, args=(number,)) for number in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[:3]
    assert sum(places.values()) == count
    return places


def leave_at_random(root: Path, count: int) -> None:
    with live(root, max_num_seqs=4, max_waiting=200, step_seconds=STEP_SECONDS) as server:
        server.publish(TASK, 0)
        server.publish("other", 1)
        start = time.monotonic()
        places = storm(server, count, seed=0)
        server.assert_idle()
        assert len(places) == 15, places
        body = {"task": TASK, "input": "x", "max_tokens": 4}
        assert server.ask("POST", "/v1/generate", body).status == 200
        assert server.engine.stats().ready and not server.engine.stats().restarts
        server.assert_idle()
        print(f"{count} clients left in {time.monotonic() - start:.0f} s: {places}")  # noqa: T201


def test_disconnects_at_random_points(tmp_path: Path) -> None:
    leave_at_random(tmp_path / "prompts", 150)


@pytest.mark.long
def test_many_disconnects_at_random_points(tmp_path: Path) -> None:
    leave_at_random(tmp_path / "prompts", int(os.environ.get("LONG_DISCONNECTS", "20000")))


@pytest.mark.parametrize("streamed", [True, False])
def test_nothing_is_computed_for_who_has_left(tmp_path: Path, streamed: bool) -> None:
    """Not that it ends some time, but that it ends at once: one who waits in the queue, and those who run."""
    with live(tmp_path / "prompts", max_num_seqs=2, step_seconds=0.01) as server:
        server.publish(TASK, 0)
        body = {"task": TASK, "input": ["a", "b", "c"], "max_tokens": 450, "ignore_eos": True, "stream": streamed}
        gone = server.listening.post("/v1/generate", body)
        wait_until(lambda: server.engine.stats().running == 2 and server.engine.stats().waiting == 1)
        gone.close()
        server.assert_idle()
        assert server.engine.stats().steps < 250, "of 900"
