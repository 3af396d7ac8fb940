"""Everything a call can end with but its result, as one tree. What is not known is None.

* ClientError
  - ConnectionFailed      the server was not reached, or went away without a reply
  - TimedOut              no reply in the client's own time
  - InvalidReply          not a reply of this API: something else listens there, or a proxy answered
  - StreamCut             a stream that ended without its `[DONE]`
  - DigestMismatch        a file is not what its digest says
  + ReplyError            the server says no
    - BadRequest          400 and every other 4xx
    - NotAuthenticated    401
    - NotAllowed          403
    - NotFound            404; also the base model, where a version is asked for
    - Conflict            409, 412, 428
    - RateLimited         429
    - ServerFailed        5xx, and the error event of a stream that had begun
    - Unavailable         503
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from app.urls import without_password


class ClientError(Exception):
    """`code` is machine-readable, `param` the parameter at fault, `retry_after` in seconds."""

    code = "client_error"
    status: int | None = None
    param: str | None = None
    request_id: str | None = None
    retry_after: float | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConnectionFailed(ClientError):
    """`sent`: the request may have arrived, and may have been done."""

    code = "connection_failed"

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class TimedOut(ClientError):
    code = "timed_out"


class InvalidReply(ClientError):
    code = "invalid_reply"


class StreamCut(ClientError):
    code = "stream_cut"


class DigestMismatch(ClientError):
    code = "digest_mismatch"


class ReplyError(ClientError):
    code = "error_reply"


class BadRequest(ReplyError):
    pass


class NotAuthenticated(ReplyError):
    pass


class NotAllowed(ReplyError):
    pass


class NotFound(ReplyError):
    code = "not_found"


class Conflict(ReplyError):
    pass


class RateLimited(ReplyError):
    pass


class ServerFailed(ReplyError):
    pass


class Unavailable(ReplyError):
    pass


_BY_STATUS: dict[int, type[ReplyError]] = {
    401: NotAuthenticated,
    403: NotAllowed,
    404: NotFound,
    409: Conflict,
    412: Conflict,
    428: Conflict,
    429: RateLimited,
    503: Unavailable,
}


def reply_error(response: httpx.Response) -> ClientError:
    """What a reply with an error status means; its body has been read."""
    status = response.status_code
    found = _error_member(response.content)
    if found is None and not response.is_error:
        return InvalidReply(f"{shown(response.url)} answered {status}: is this the address of a softprompt server?")
    found = found or {}
    message = found.get("message") or f"HTTP {status} {response.reason_phrase}".rstrip()
    error = _BY_STATUS.get(status, ServerFailed if status >= 500 else BadRequest)(str(message))
    error.status = status
    error.request_id = response.headers.get("x-request-id")
    error.retry_after = _seconds(response.headers.get("retry-after"))
    return _described(error, found)


def shown(url: httpx.URL) -> str:
    """For a message."""
    return without_password(str(url))


def event_error(found: Any, request_id: str | None) -> ClientError:
    """What the error event of a stream means."""
    if not isinstance(found, dict):
        return InvalidReply("the stream has an error event that says nothing")
    error = ServerFailed(str(found.get("message") or "the stream failed"))
    error.request_id = request_id
    return _described(error, found)


@contextmanager
def translated() -> Iterator[None]:
    """httpx's errors as ours."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError) as error:
        raise ConnectionFailed(f"{_address(error)} was not reached: {_reason(error)}", sent=False) from error
    except httpx.TimeoutException as error:
        raise TimedOut(f"{_address(error)} did not reply in time") from error
    except httpx.TransportError as error:
        raise ConnectionFailed(f"{_address(error)} went away: {_reason(error)}", sent=True) from error
    except httpx.DecodingError as error:
        raise InvalidReply(f"{_address(error)} sent what cannot be read: {_reason(error)}") from error


def _described(error: ReplyError, found: dict[str, Any]) -> ReplyError:
    error.code = str(found.get("code") or error.code)
    error.param = None if found.get("param") is None else str(found["param"])
    return error


def _error_member(body: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(body)
    except ValueError:
        return None
    found = document.get("error") if isinstance(document, dict) else None
    return found if isinstance(found, dict) else None


def _seconds(header: str | None) -> float | None:
    """Of Retry-After; a date, which this API does not send, counts as none."""
    return float(header) if header is not None and header.isascii() and header.isdecimal() else None


def _address(error: httpx.RequestError) -> str:
    """Of the server."""
    return shown(error.request.url.copy_with(path="/", query=None, fragment=None)).removesuffix("/")


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return re.sub(r"^\[Errno -?\d+\] ", "", text)
