"""What both clients are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import httpx

from app import __version__
from app.client.call import Call
from app.client.errors import ClientError
from app.client.retries import Retries

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = 660.0  # seconds without a byte: more than a server takes by default to give up on a request
CONNECT_TIMEOUT = 5.0  # seconds


class Connection:
    """An address and how to speak to it. `transport` is httpx's, for proxies and tests.

    `timeout`: seconds without a byte. Raises ValueError for what is no http or https URL.
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
    except httpx.InvalidURL as error:
        raise ValueError(f"{url!r} is no URL: {error}") from None
    if found.scheme not in ("http", "https") or not found.host:
        raise ValueError(f"{url!r} is no http:// or https:// URL")
