"""What both clients are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import httpx

from app import __version__
from app.client.call import Call
from app.client.errors import ClientError
from app.client.retries import Retries
from app.urls import without_password

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = 660.0  # seconds without a byte: more than a server takes by default to give up on a request
CONNECT_TIMEOUT = 5.0  # seconds


class Connection:
    """An address and how to speak to it. `transport` is httpx's, for proxies and tests.

    `timeout`: seconds without a byte. Raises ValueError for what is no http or https URL, and for a key that no header
    can hold.
    """

    _kind: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        retries: Retries | None = None,
        max_connections: int = 100,
        transport: Any = None,
    ) -> None:
        check_url(url)
        headers = {"User-Agent": f"softprompt/{__version__}"}
        if api_key is not None:
            _check_key(api_key)
            headers["Authorization"] = f"Bearer {api_key}"
        self._retries = retries or Retries()
        self._http: Any = self._kind(
            base_url=url,
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT), pool=None),
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
            transport=transport,
        )

    def _wait(self, call: Call[Any], error: ClientError, attempt: int) -> float:
        """Seconds until the call is made again. Raises the error if it is not."""
        wait = self._retries.wait(error, attempt, repeatable=call.repeatable) if call.retried else None
        if wait is None:
            raise error
        return wait


def check_url(url: str) -> None:
    """Raises ValueError."""
    try:
        found = httpx.URL(url)
    except httpx.InvalidURL:  # its message may quote a password
        raise ValueError(f"{without_password(url)!r} is no URL") from None
    if found.scheme not in ("http", "https") or not found.host:
        raise ValueError(f"{without_password(url)!r} is no http:// or https:// URL")


def _check_key(api_key: str) -> None:
    """Before the HTTP library does, which quotes what it refuses."""
    if not api_key or not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
        raise ValueError("the API key is not printable ASCII without spaces; was a line feed read with it?")
