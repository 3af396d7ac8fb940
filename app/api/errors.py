"""One error body everywhere: the members of RFC 9457 beside the `error` object that OpenAI clients read."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from app.errors import InvalidRequest, RequestError, SoftpromptError

log = logging.getLogger(__name__)

MAX_MESSAGE = 1_000  # characters
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def error_object(error: SoftpromptError) -> dict[str, Any]:
    """The `error` member, also sent as an event once a stream has begun."""
    kind = "invalid_request_error" if isinstance(error, RequestError) else "server_error"
    return {"message": error.message[:MAX_MESSAGE], "type": kind, "param": error.param, "code": error.code}


def unexpected(error: BaseException) -> SoftpromptError:
    """Log what nobody foresaw; the client learns nothing of it."""
    log.error("unexpected error", exc_info=error)
    return SoftpromptError("the server could not finish this request")


def problem_body(error: SoftpromptError, request_id: str) -> dict[str, Any]:
    """The body of the reply to a failed request."""
    return _body(error.status, error.title, error_object(error), request_id)


def problem(request: Request, error: SoftpromptError, headers: Mapping[str, str] | None = None) -> Response:
    """The reply to a failed request."""
    request.state.stats.fails(error)
    all_headers = {**error.headers, **(headers or {})}
    return _problem(request, error.status, error.title, error_object(error), error.retry_after, all_headers)


def install(app: FastAPI) -> None:
    """Every exception that can leave a route gets a body from here."""
    app.add_exception_handler(SoftpromptError, _on_softprompt_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_exception)


def _body(status: int, title: str, error: dict[str, Any], request_id: str) -> dict[str, Any]:
    return {
        "type": f"urn:softprompt:problem:{error['code']}",
        "title": title,
        "status": status,
        "detail": error["message"],
        "instance": f"urn:softprompt:request:{request_id}",
        "error": error,
    }


def _problem(
    request: Request,
    status: int,
    title: str,
    error: dict[str, Any],
    retry_after: int | None,
    headers: dict[str, str],
) -> Response:
    body = _body(status, title, error, request.state.request_id)
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    if status == HTTPStatus.REQUEST_TIMEOUT:
        headers["Connection"] = "close"  # the rest of the request may never come (RFC 9110, section 15.5.9)
    # NOTE: ASCII, because a message may hold what UTF-8 cannot, such as half a surrogate pair.
    return Response(json.dumps(body), status, headers, "application/problem+json")


async def _on_softprompt_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SoftpromptError)
    return problem(request, error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    """400 that names the parameter. The input is not repeated, whatever its size."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    location = found[0]["loc"]
    param = str(location[1]) if len(location) > 1 else None
    if param is not None and _NAME.fullmatch(param) is None:
        param = None
    if found[0]["type"] == "extra_forbidden":
        message = "is not a parameter that this route supports"
    else:
        same = [_message(item) for item in found if item["loc"][:2] == location[:2]]
        message = "; ".join(dict.fromkeys(same))
    return problem(request, InvalidRequest(f"{param or 'a parameter'}: {message}", param=param))


def _message(problem: Mapping[str, Any]) -> str:
    """pydantic's, which repeats of the input only the tag of a union."""
    if problem["type"] == "union_tag_invalid":
        return f"{problem['ctx']['discriminator']} must be one of {problem['ctx']['expected_tags']}"
    return str(problem["msg"])


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What the router raises: no such route (404) or no such method on it (405)."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    code = status.phrase.lower().replace(" ", "_")
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"message": status.description or status.phrase, "type": kind, "param": None, "code": code}
    request.state.stats.error_code = code
    return _problem(request, status, status.phrase, body, None, dict(error.headers or {}))


async def _on_disconnect(request: Request, error: Exception) -> Response:  # noqa: ARG001
    """Nobody reads it; 499 is what proxies log for a client that left."""
    request.state.stats.cause = "disconnect"
    return Response(status_code=499)


async def _on_exception(request: Request, error: Exception) -> Response:  # noqa: ARG001
    # Starlette raises it again after this reply, and uvicorn logs it.
    failure = SoftpromptError("the server could not finish this request")
    return problem(request, failure, {"X-Request-Id": request.state.request_id})
