"""What the commands that talk to a server have in common: its address, a key, and names to complete."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from app.config import Settings
from app.errors import InvalidSettings

if TYPE_CHECKING:
    from app.client import AsyncClient, Client

RETRIES = 2  # somebody waits
COMPLETION_TIMEOUT = 0.5  # seconds; whoever types does not wait longer

Url = Annotated[
    str | None, typer.Option("--url", help="The server; default: SOFTPROMPT_URL, else http://127.0.0.1:8000")
]
ApiKey = Annotated[str | None, typer.Option("--api-key", help="Its key; default: SOFTPROMPT_API_KEY")]


def connect(url: str | None, api_key: str | None) -> Client:
    """A client by the options and the settings. Raises InvalidSettings."""
    from app.client import Client, Retries  # httpx takes time that --help need not

    where, key = _server(url, api_key)
    with _refused():
        return Client(where, api_key=key, retries=Retries(most=RETRIES))


def connect_async(url: str | None, api_key: str | None, *, connections: int, retries: int) -> AsyncClient:
    """As `connect`, for many requests at once; `retries`: how often each is made again."""
    from app.client import AsyncClient, Retries

    where, key = _server(url, api_key)
    with _refused():
        return AsyncClient(where, api_key=key, max_connections=connections, retries=Retries(most=retries))


def finite(value: float | None) -> float | None:
    """Of an option, which Python reads "nan" and "inf" for too: no JSON has them. Raises BadParameter."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


def complete_reference(incomplete: str) -> list[str]:
    """Tasks that begin like this, or after `@` and `:` a task's aliases and versions; none where no server answers."""
    from app.client import Client, Retries

    name, mark, _ = incomplete.partition("@") if "@" in incomplete else incomplete.partition(":")
    try:
        where, key = _server(None, None)
        with Client(where, api_key=key, timeout=COMPLETION_TIMEOUT, retries=Retries(most=0)) as client:
            if not mark:
                return [found.task for found in client.models() if found.task and found.task.startswith(name)]
            task = client.task(name)
    except Exception:  # a person is typing: nothing that goes wrong here is worth a word
        return []
    ends = list(task.aliases) if mark == "@" else [str(number) for number in task.versions]
    return [found for end in ends if (found := f"{name}{mark}{end}").startswith(incomplete)]


@contextmanager
def _refused() -> Iterator[None]:
    """What the settings let pass and the client does not."""
    try:
        yield
    except ValueError as error:
        raise InvalidSettings(str(error)) from None


def _server(url: str | None, api_key: str | None) -> tuple[str, str | None]:
    settings = Settings.load(url=url, api_key=api_key)
    return settings.url, settings.api_key.get_secret_value() if settings.api_key else None


Reference = Annotated[
    str, typer.Argument(help="task, task:7, task@alias or task@sha256:...", autocompletion=complete_reference)
]
TaskName = Annotated[str, typer.Argument(help="Name of the task", autocompletion=complete_reference)]
