"""Clients that read slowly, or not at all: nobody else notices, and who takes nothing is cut."""

from __future__ import annotations

import time
from pathlib import Path

from tests.api_harness import events, read_stream, wait_until
from tests.load_driver import Driver, driver, percentile
from tests.load_harness import live

NUM_STALLED = 8
SEND_TIMEOUT = 1.0
BODY = {"task": "mood", "input": "x", "max_tokens": 60, "ignore_eos": True, "stream": True}
# Log-probabilities make its events larger than every buffer on the way.
HEAVY = BODY | {"max_tokens": 480, "logprobs": 20, "input": ["a", "b"]}


def silences(clients: Driver) -> list[float]:
    """Between the parts of four streams."""
    sent = clients.run([["POST", "/v1/generate", BODY]], 1.0, clients=4)
    for request in sent:
        assert request.status == 200 and "[DONE]" in request.body and '"error"' not in request.body
    return [after - before for request in sent for before, after in zip(request.parts, request.parts[1:], strict=False)]


def test_readers_that_stall_are_cut_and_hurt_nobody(tmp_path: Path) -> None:
    root = tmp_path / "prompts"
    timeouts = {"send_timeout": SEND_TIMEOUT, "stall_timeout": SEND_TIMEOUT}
    with live(root, max_num_seqs=32, step_seconds=0.005, **timeouts) as server:
        server.publish("mood", 0)
        with driver(server.port) as clients:
            alone = silences(clients)
            stalled = [server.listening.post("/v1/generate", HEAVY, receive_buffer=4096) for _ in range(NUM_STALLED)]
            wait_until(lambda: server.engine.stats().running >= 2 * NUM_STALLED)
            beside = silences(clients)
        # They are cut while they still hold their end open.
        wait_until(lambda: server.listening.num_connections == 0, 60)
        server.assert_idle()
        for connection in stalled:
            connection.close()
        print(  # noqa: T201
            f"p99 between parts: {percentile(alone, 0.99) * 1e3:.0f} ms alone, {percentile(beside, 0.99) * 1e3:.0f} ms "
            f"beside {NUM_STALLED} stalled readers of {2 * NUM_STALLED} streams"
        )
        # The rows beside them cost their share of a step; a send that blocked would cost the whole send timeout.
        assert percentile(beside, 0.99) < min(SEND_TIMEOUT, 3 * percentile(alone, 0.99) + 0.1)


def test_a_slow_reader_gets_everything(tmp_path: Path) -> None:
    """Slower than the model, but never silent for as long as the send timeout."""
    with live(tmp_path / "prompts", send_timeout=SEND_TIMEOUT) as server:
        server.publish("mood", 0)
        connection = server.listening.post("/v1/generate", HEAVY | {"max_tokens": 200}, receive_buffer=4096)
        wait_until(lambda: server.engine.stats().running == 0 and server.engine.stats().steps > 100)
        time.sleep(SEND_TIMEOUT / 3)
        pieces = events(read_stream(connection))
        assert pieces[-1]["usage"]["completion_tokens"] == 400
        server.assert_idle()
