"""From the engine thread to asyncio."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

from app.engine import Token

log = logging.getLogger(__name__)


class Outbox:
    """What a step has for the event loops: one wake-up per loop and step instead of one per token."""

    def __init__(self) -> None:
        self._items: dict[asyncio.AbstractEventLoop, list[tuple[LocalGeneration, Token | Exception]]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, generation: LocalGeneration, item: Token | Exception) -> None:
        self._items.setdefault(loop, []).append((generation, item))

    def flush(self) -> None:
        items, self._items = self._items, {}
        for loop, batch in items.items():
            _call(loop, _deliver, batch)


def _deliver(batch: list[tuple[LocalGeneration, Token | Exception]]) -> None:
    for generation, item in batch:
        generation.receive(item)


class LocalGeneration(AsyncIterator[Token]):
    """Tokens of one sequence, handed over from the engine thread to the event loop that created this.

    The queue needs no bound of its own: it never holds more than `max_tokens`.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Token | Exception] = asyncio.Queue()
        self._ended = False
        self.cancel: Callable[[], None] = lambda: None

    def emit(self, item: Token | Exception) -> None:
        """Called by the engine thread, which flushes its outbox after the step."""
        self._outbox.add(self._loop, self, item)

    def receive(self, item: Token | Exception) -> None:
        """Called in the event loop."""
        self._queue.put_nowait(item)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        if self._ended:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, Exception):
            self._ended = True
            raise item
        self._ended = self._ended or item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        """Cancel if it has not ended. Idempotent; does not wait for the engine."""
        if not self._ended:
            self._ended = True
            self.cancel()
            self._queue.put_nowait(Token(None, "abort"))  # for a reader that is waiting


def post(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], result: Any) -> None:
    """Resolve a future of `loop` from another thread; an exception as `result` is raised there."""

    def resolve() -> None:
        if future.done():  # cancelled
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    _call(loop, resolve)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        log.debug("the event loop has closed before its result came")
