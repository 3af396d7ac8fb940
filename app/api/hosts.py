"""Which Host headers are answered. A page elsewhere can point a name of its own at this address (DNS rebinding)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import problem
from app.config import Settings
from app.errors import InvalidRequest

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::[0-9]*)?")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address to listen on."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may mean anything
        return False


def allowed_hosts(settings: Settings) -> tuple[str, ...]:
    if settings.allowed_hosts:
        return settings.allowed_hosts
    return (*LOOPBACK_NAMES, settings.host) if is_loopback(settings.host) else ("*",)


class HostMiddleware:
    """Answers 400 to a request for another host; starlette's own does so without our error body."""

    def __init__(self, app: ASGIApp, *, allowed: Sequence[str]) -> None:
        """`*.example.org` stands for every name below it, `*` for all."""
        self._app = app
        self._allowed = {host.lower() for host in allowed}
        self._below = tuple(host[1:] for host in self._allowed if host.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "*" not in self._allowed:
            request = Request(scope, receive)
            host = _name(request.headers.get("host", ""))
            if host not in self._allowed and not (self._below and host.endswith(self._below)):
                refusal = InvalidRequest("this host is not served here: SOFTPROMPT_ALLOWED_HOSTS", code="invalid_host")
                await problem(request, refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name(header: str) -> str:
    """Without the port, in lower case; an IPv6 address keeps its brackets. "" for what is no Host header."""
    match = _HOST.fullmatch(header)
    return match[1].lower() if match else ""
