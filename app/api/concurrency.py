"""Running the work of a request: several engine calls at once, and none for a client that has left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Never, TypeVar

import anyio
import anyio.to_thread
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from app.errors import Overloaded

T = TypeVar("T")


class Threads:
    """Threads of their own for work that may be held up, by a disk or a lock, so that it holds up nothing else."""

    def __init__(self, number: int) -> None:
        self._limiter = anyio.CapacityLimiter(number)

    async def run(self, work: Callable[[], T]) -> T:
        """As soon as one is free, first come, first served."""
        return await anyio.to_thread.run_sync(work, limiter=self._limiter)


class Room:
    """A thread for work that may take seconds, so that it takes none of those that every request needs."""

    def __init__(self, max_waiting: int, what: str) -> None:
        """`what` is worked on, in the plural."""
        self._max_inside = 1 + max_waiting
        self._what = what
        self._num_inside = 0
        self._limiter = anyio.CapacityLimiter(1)

    async def run(self, work: Callable[[], T]) -> T:
        """One at a time, first come, first served. Raises Overloaded if too many wait."""
        if self._num_inside >= self._max_inside:
            raise Overloaded(f"too many {self._what} wait for their turn")
        self._num_inside += 1
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._limiter)
        finally:
            self._num_inside -= 1


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. The first failure is raised once the others have been cancelled and have ended."""
    tasks = [asyncio.create_task(item) for item in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        return [task.result() for task in tasks if task.done()]
    finally:
        await _end(tasks)


async def first(*work: Coroutine[Any, Any, T]) -> T:
    """What the first to end returns or raises; the others are cancelled and have ended when this returns."""
    tasks = [asyncio.create_task(item) for item in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task.done()).result()
    finally:
        await _end(tasks)


async def disconnection(receive: Receive) -> Never:
    """Wait until the client leaves, then raise ClientDisconnect. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


async def _end(tasks: list[asyncio.Task[T]]) -> None:
    for task in tasks:
        task.cancel()
    # A deadline that has passed cancels whatever is awaited, over and over.
    with anyio.CancelScope(shield=True):
        await asyncio.gather(*tasks, return_exceptions=True)
