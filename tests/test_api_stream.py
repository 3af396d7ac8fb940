"""Server-sent events against a scripted client: framing, pings, errors, and an end that always closes."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from app.api.concurrency import first, together
from app.api.counts import Counts
from app.api.request_stats import RequestStats
from app.api.stream import Emit, EventStream
from app.errors import EngineFailed, SoftpromptError


class Client:
    """Takes what is sent, until it stalls; leaves when told to."""

    def __init__(self, *, stall_after: int = 10**9) -> None:
        self.messages: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self._stall_after = stall_after

    async def send(self, message: Any) -> None:
        if len(self.messages) >= self._stall_after:
            await asyncio.Event().wait()
        self.messages.append(message)

    async def receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def complete(self) -> bool:
        return self.messages[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


def run(
    produce: Callable[[Emit], Awaitable[None]],
    client: Client,
    *,
    leave_after: float | None = None,
    ping_interval: float = 15.0,
) -> int:
    """Send one stream to the end; returns how often it was closed."""
    closed = 0

    async def close() -> None:
        nonlocal closed
        closed += 1

    stats = RequestStats(Counts(list))

    async def main() -> None:
        stream = EventStream(produce, close, send_timeout=0.05, headers={}, stats=stats, ping_interval=ping_interval)
        if leave_after is not None:
            asyncio.get_running_loop().call_later(leave_after, client.left.set)
        async with asyncio.timeout(5):
            await stream({"type": "http"}, client.receive, client.send)

    asyncio.run(main())
    return closed


async def forever(_: Emit) -> None:
    await asyncio.Event().wait()


async def flood(emit: Emit) -> None:
    while True:
        await emit({"n": 1})


def test_framing() -> None:
    async def produce(emit: Emit) -> None:
        await emit({"text": "a\n\r\u2028\u0085é"})
        await emit({"n": 2})

    client = Client()
    assert run(produce, client) == 1
    assert client.body == b'data: {"text":"a\\n\\r\\u2028\\u0085\\u00e9"}\n\ndata: {"n":2}\n\ndata: [DONE]\n\n'
    assert client.complete and client.messages[0]["status"] == 200
    assert len(client.messages) == 5, "each event is on its way before the next is produced"


@pytest.mark.parametrize("error", [EngineFailed("the engine stopped"), KeyError("secret")])
def test_an_error_becomes_an_event(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def produce(emit: Emit) -> None:
        await emit({"n": 1})
        raise error

    client = Client()
    assert run(produce, client) == 1
    _, failure, done, _ = client.body.split(b"\n\n")
    found = json.loads(failure.removeprefix(b"data: "))["error"]
    assert done == b"data: [DONE]" and client.complete
    assert found["type"] == "server_error" and "secret" not in found["message"]
    assert found["code"] == (error.code if isinstance(error, SoftpromptError) else "internal_error")
    logged = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert bool(logged) is isinstance(error, KeyError), "only what nobody foresaw is logged"


def test_pings_while_nothing_happens() -> None:
    async def produce(emit: Emit) -> None:
        await asyncio.sleep(0.2)
        await emit({"n": 1})

    client = Client()
    run(produce, client, ping_interval=0.05)
    before, after = client.body.split(b'data: {"n":1}')
    assert 2 <= before.count(b": ping\n\n") <= 4 and b"ping" not in after


def test_no_pings_while_events_flow() -> None:
    async def produce(emit: Emit) -> None:
        for _ in range(20):
            await asyncio.sleep(0.01)
            await emit({"n": 1})

    client = Client()
    run(produce, client, ping_interval=0.15)
    assert b"ping" not in client.body


@pytest.mark.parametrize("produce", [forever, flood])
def test_a_client_that_leaves(produce: Callable[[Emit], Awaitable[None]]) -> None:
    cancelled = []

    async def watched(emit: Emit) -> None:
        try:
            await produce(emit)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    client = Client()
    # Without a pause a flood over a client that never blocks would not let the loop turn.
    client.send = pausing(client.send)  # type: ignore[method-assign]
    assert run(watched, client, leave_after=0.05) == 1
    assert cancelled and not client.complete


@pytest.mark.parametrize("stall_after", [0, 1, 5])
def test_a_client_that_stalls(stall_after: int) -> None:
    client = Client(stall_after=stall_after)
    assert run(flood, client) == 1
    assert len(client.messages) == stall_after


def test_a_client_that_stalls_at_a_ping() -> None:
    """The producer waits for the engine meanwhile, and would never notice."""
    client = Client(stall_after=1)
    assert run(forever, client, ping_interval=0.02) == 1


def pausing(send: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    async def paused(message: Any) -> None:
        await asyncio.sleep(0)
        await send(message)

    return paused


def test_together_ends_the_others_before_it_raises() -> None:
    ended = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            ended.append(True)

    async def fail() -> None:
        raise KeyError("x")

    async def main() -> None:
        with pytest.raises(KeyError):
            await together([wait(), fail(), wait()])
        assert len(ended) == 2
        assert await together([asyncio.sleep(0.01, "a"), asyncio.sleep(0, "b")]) == ["a", "b"]

    asyncio.run(main())


def test_first_prefers_its_first_argument() -> None:
    async def now(value: str) -> str:
        return value

    async def main() -> None:
        assert await first(now("a"), now("b")) == "a"
        assert await first(asyncio.sleep(10, "a"), now("b")) == "b"

    asyncio.run(main())
