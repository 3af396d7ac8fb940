"""Which pages of other origins may call this server, and what they may send and see."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.access.meter import LIMITED
from app.api.deadline import HEADER
from app.api.errors import problem
from app.errors import InvalidRequest


class Cors(CORSMiddleware):
    """starlette's, with our error body for a refused preflight."""

    def __init__(self, app: ASGIApp, *, origins: tuple[str, ...]) -> None:
        """`*` among `origins` stands for all. Without credentials: keys are sent by scripts, not by browsers."""
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "X-Api-Key", "X-Request-Id", HEADER, "If-Match", "If-None-Match"],
            expose_headers=[
                *("ETag", "Location", "Retry-After", "X-Request-Id"),
                *("X-Prompt-Version", "X-Prompt-Digest", "X-Ignored-Fields"),
                *(f"x-ratelimit-{what}-{of}" for of in LIMITED for what in ("limit", "remaining", "reset")),
            ],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        found = super().preflight_response(request_headers)
        return found if found.status_code < 400 else _Refused(found)


class _Refused(Response):
    """Made where the request, whose id it names, is not known yet."""

    def __init__(self, plain: Response) -> None:
        super().__init__(status_code=plain.status_code)
        self._reason = bytes(plain.body).decode()  # which of origin, method and headers; nothing of the request
        self._also = {name: value for name, value in plain.headers.items() if not name.startswith("content-")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await problem(Request(scope), InvalidRequest(self._reason), self._also)(scope, receive, send)
