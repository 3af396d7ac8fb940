"""`Client`: the methods of `calls` and `alias_calls`, blocking."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import httpx

from app.client import alias_calls, calls
from app.client.call import Call, Plan
from app.client.connection import Connection
from app.client.errors import ClientError, reply_error, translated
from app.client.stream import Stream

P = ParamSpec("P")
T = TypeVar("T")


def _method(build: Callable[P, Plan[T]]) -> Callable[Concatenate[Client, P], T]:
    @functools.wraps(build)
    def call(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return client.run(build(*args, **kwargs))

    return call


def _iterator(build: Callable[P, calls.Listing[T]]) -> Callable[Concatenate[Client, P], Iterator[T]]:
    @functools.wraps(build)
    def call(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        listing = build(*args, **kwargs)
        following: Call[Any] | None = listing.first
        while following is not None:
            page = client.run(following)
            yield from page.data
            following = listing.after(page)

    return call


def _stream(build: Callable[P, Call[Any]]) -> Callable[Concatenate[Client, P], AbstractContextManager[Stream]]:
    @functools.wraps(build)
    def call(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[Stream]:
        return client._open(build(*args, **kwargs))

    return call


class Client(Connection):
    """A server's API, blocking. A context manager; may be used by several threads."""

    _kind = httpx.Client
    _http: httpx.Client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

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

    def run(self, plan: Plan[T]) -> T:
        """Make the calls of a plan. Raises ClientError."""
        steps = iter(plan)
        try:
            call = next(steps)
            while True:
                call = steps.send(self._send(call))
        except StopIteration as end:
            result: T = end.value
            return result

    def _send(self, call: Call[Any]) -> Any:
        for attempt in range(self._retries.most + 1):
            try:
                with translated():
                    return call.result(self._http.send(call.request(self._http)))
            except ClientError as error:
                time.sleep(self._wait(call, error, attempt))
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def _open(self, call: Call[Any]) -> Iterator[Stream]:
        response = self._begin(call)
        try:
            yield Stream(response)
        finally:
            response.close()

    def _begin(self, call: Call[Any]) -> httpx.Response:
        for attempt in range(self._retries.most + 1):
            try:
                with translated():
                    response = self._http.send(call.request(self._http), stream=True)
                    if response.is_success:
                        return response
                    response.read()
                    raise reply_error(response)
            except ClientError as error:
                time.sleep(self._wait(call, error, attempt))
        raise AssertionError("the last attempt returns or raises")
