"""`AsyncClient`: the methods of `calls` and `alias_calls`, for asyncio."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import anyio
import httpx

from app.client import alias_calls, calls
from app.client.call import Call, Plan
from app.client.connection import Connection
from app.client.errors import ClientError, reply_error, translated
from app.client.stream import AsyncStream

P = ParamSpec("P")
T = TypeVar("T")


def _method(build: Callable[P, Plan[T]]) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    @functools.wraps(build)
    async def call(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await client.run(build(*args, **kwargs))

    return call


def _iterator(build: Callable[P, calls.Listing[T]]) -> Callable[Concatenate[AsyncClient, P], AsyncIterator[T]]:
    @functools.wraps(build)
    async def call(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        listing = build(*args, **kwargs)
        following: Call[Any] | None = listing.first
        while following is not None:
            page = await client.run(following)
            for item in page.data:
                yield item
            following = listing.after(page)

    return call


def _stream(
    build: Callable[P, Call[Any]],
) -> Callable[Concatenate[AsyncClient, P], AbstractAsyncContextManager[AsyncStream]]:
    @functools.wraps(build)
    def call(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AbstractAsyncContextManager[AsyncStream]:
        return client._open(build(*args, **kwargs))

    return call


class AsyncClient(Connection):
    """A server's API. An asynchronous context manager."""

    _kind = httpx.AsyncClient
    _http: httpx.AsyncClient

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    generate = _method(calls.generate)
    stream = _stream(calls.stream)
    classify = _method(calls.classify)
    tokenize = _method(calls.tokenize)
    detokenize = _method(calls.detokenize)
    models = _method(calls.models)
    model = _method(calls.model)
    tasks = _iterator(calls.tasks)
    task = _method(calls.task)
    versions = _iterator(calls.versions)
    version = _method(calls.version)
    push = _method(calls.push)
    pull = _method(calls.pull)
    file = _method(calls.file)
    delete_version = _method(calls.delete_version)
    delete_task = _method(calls.delete_task)
    restore = _method(calls.restore)
    alias = _method(alias_calls.alias)
    set_alias = _method(alias_calls.set_alias)
    remove_alias = _method(alias_calls.remove_alias)
    roll_back = _method(alias_calls.roll_back)
    history = _iterator(calls.history)
    inspect = _method(calls.inspect)
    audit = _iterator(calls.audit)
    info = _method(calls.info)
    ready = _method(calls.ready)

    async def run(self, plan: Plan[T]) -> T:
        """Make the calls of a plan. Raises ClientError."""
        steps = iter(plan)
        try:
            call = next(steps)
            while True:
                call = steps.send(await self._send(call))
        except StopIteration as end:
            result: T = end.value
            return result

    async def _send(self, call: Call[Any]) -> Any:
        for attempt in range(self._retries.most + 1):
            try:
                with translated():
                    return call.result(await self._http.send(call.request(self._http)))
            except ClientError as error:
                await anyio.sleep(self._wait(call, error, attempt))
        raise AssertionError("the last attempt returns or raises")

    @asynccontextmanager
    async def _open(self, call: Call[Any]) -> AsyncIterator[AsyncStream]:
        response = await self._begin(call)
        try:
            yield AsyncStream(response)
        finally:
            await response.aclose()

    async def _begin(self, call: Call[Any]) -> httpx.Response:
        for attempt in range(self._retries.most + 1):
            try:
                with translated():
                    response = await self._http.send(call.request(self._http), stream=True)
                    if response.is_success:
                        return response
                    await response.aread()
                    raise reply_error(response)
            except ClientError as error:
                await anyio.sleep(self._wait(call, error, attempt))
        raise AssertionError("the last attempt returns or raises")
