"""One exchange with the server as a value, and several in a row as a generator: neither knows who sends them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from app.client.errors import InvalidReply, reply_error, shown

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
M = TypeVar("M", bound=BaseModel)

Steps = Generator["Call[Any]", Any, T]


class Plan(Protocol[T_co]):
    """Calls one after another: each is yielded, what it gave is sent back, the last word is returned."""

    def __iter__(self) -> Steps[T_co]: ...


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request and how its reply is read. It is a plan of one step."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    params: Mapping[str, Any] = field(default_factory=dict)  # those that are None are left out
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    files: Mapping[str, tuple[str, bytes]] | None = None
    repeatable: bool = True  # done twice is as done once: may be made again when the reply was lost
    retried: bool = True

    def __iter__(self) -> Steps[T]:
        result: T = yield self
        return result

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        params = {name: value for name, value in self.params.items() if value is not None}
        return http.build_request(
            self.method, self.path, params=params, headers=self.headers, json=self.json, files=self.files
        )

    def result(self, response: httpx.Response) -> T:
        """Raises ClientError. The body has been read."""
        if not response.is_success:
            raise reply_error(response)
        return self.read(response)


def path(*parts: str | int) -> str:
    """A path of parts, each of which may hold anything."""
    return "/" + "/".join(quote(str(part), safe="") for part in parts)


def reading(model: type[M]) -> Callable[[httpx.Response], M]:
    """Reads a JSON body. Members that this version does not know are kept."""

    def read(response: httpx.Response) -> M:
        try:
            return model.model_validate_json(response.content)
        except ValidationError as error:
            raise InvalidReply(f"{shown(response.url)} answered what is no {model.__name__}") from error

    return read


def given(**fields: Any) -> dict[str, Any]:
    """A body of the fields that are not None."""
    return {
        name: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in fields.items()
        if value is not None
    }


def etag_of(response: httpx.Response) -> str:
    """A proxy that compresses makes the tag a weak one."""
    return str(response.headers.get("etag", "")).removeprefix("W/")
