"""How a command ends: its exit code, and one line or one JSON document on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any, Final

import typer

from app.cli.output import err, printable
from app.errors import InvalidRecipe, InvalidRequest, InvalidSettings, SoftpromptError

NEWLINE = "\n"

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3
NOT_FOUND: Final = 4
CONFLICT: Final = 5
PARTIAL: Final = 6
NOT_ALLOWED: Final = 7
BUSY: Final = 8
INTERRUPTED: Final = 130

MEANINGS: dict[int, str] = {
    OK: "done",
    FAILED: "the server, or the command itself, refused or failed",
    USAGE: "wrong options, arguments or settings",
    UNREACHABLE: "no server there, or it did not answer in time",
    NOT_FOUND: "no such task, version, alias or key",
    CONFLICT: "somebody else was first, or an alias still names it",
    PARTIAL: "some rows or requests failed",
    NOT_ALLOWED: "no key, or one that may not do this",
    BUSY: "the server is busy or not ready, or a limit is reached: try again later",
    INTERRUPTED: "interrupted",
}
EPILOG = "Exit codes: " + " · ".join(f"{code} {meaning}" for code, meaning in MEANINGS.items())

_BY_STATUS = {401: NOT_ALLOWED, 403: NOT_ALLOWED, 404: NOT_FOUND, 409: CONFLICT, 412: CONFLICT, 428: CONFLICT}
_BY_STATUS |= {429: BUSY, 503: BUSY}


def is_known(error: Exception) -> bool:
    """Whether it is a user's to read: one of ours or of the client's, a wrong option, a file that cannot be had."""
    from app.client import ClientError  # httpx takes time that what goes well need not

    return isinstance(error, ClientError | SoftpromptError | OSError | typer.TyperException)


def exit_code(error: Exception) -> int:
    """Of any error that is known."""
    from app.client import ConnectionFailed, InvalidReply, NotFound, StreamCut, TimedOut

    if isinstance(error, typer.TyperException):
        return error.exit_code
    if isinstance(error, InvalidSettings | InvalidRequest | InvalidRecipe):  # of this process: what was typed
        return USAGE
    if isinstance(error, NotFound):
        return NOT_FOUND
    if isinstance(error, ConnectionFailed | TimedOut | StreamCut | InvalidReply):
        return UNREACHABLE
    return _BY_STATUS.get(getattr(error, "status", None) or 0, FAILED)


def report(error: Exception, *, as_json: bool) -> None:
    """On stderr, for a person or for a program."""
    found = describe(error)
    if as_json:
        sys.stderr.write(json.dumps({"error": found}) + "\n")
    elif found["message"]:  # typer shows the help where a command is missing, and has nothing to add
        err.print("[red]error[/red] ", end="")
        err.print(f"({found['code']}): {printable(found['message'], keep=NEWLINE)}", markup=False, soft_wrap=True)


def describe(error: Exception) -> dict[str, Any]:
    """The members of an error document."""
    found: dict[str, Any]
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        found = {"code": "os_error", "message": f"{where}{error.strerror or error}"}
    elif isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        message = error.format_message()
        found = {"code": "usage", "message": message and message.rstrip(".") + hint}
    else:
        names = ("code", "message", "status", "param", "request_id", "retry_after")
        found = {name: getattr(error, name, None) for name in names}
        if isinstance(error, SoftpromptError):
            del found["status"]  # nobody asked over HTTP
    return {name: value for name, value in found.items() if value is not None}
