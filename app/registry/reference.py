"""The one string that names a version everywhere: `task`, `task:7`, `task@prod` or `task@sha256:<digest>`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from app.errors import InvalidRequest, ReferenceNotFound

DEFAULT_ALIAS = "latest"

_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
_ALIAS = rf"(?![0-9]+\Z){_NAME}"  # all digits would read as a version number
_TASK_NAME = re.compile(_NAME)
_ALIAS_NAME = re.compile(_ALIAS)
# Nine digits: far beyond any real number, and int() of a hostile one costs nothing.
_REFERENCE = re.compile(
    rf"(?P<task>{_NAME})"
    rf"(?: : (?P<version>[1-9][0-9]{{0,8}}) | @ (?P<digest>sha256:[0-9a-f]{{64}}) | @ (?P<alias>{_ALIAS}) )?",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Reference:
    """A parsed reference: exactly one of `version`, `alias` and `digest` is set."""

    task: str
    version: int | None = None
    alias: str | None = None
    digest: str | None = None  # "sha256:<hex>"


def parse_reference(text: str) -> Reference:
    """Parse a reference. Malformed ones raise the ReferenceNotFound that unknown ones get."""
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise not_found()
    task, version, digest, alias = match.group("task", "version", "digest", "alias")
    if version is not None:
        return Reference(task, version=int(version))
    if digest is not None:
        return Reference(task, digest=digest)
    return Reference(task, alias=alias or DEFAULT_ALIAS)


def not_found() -> ReferenceNotFound:
    """One message for everything that does not exist: it repeats no input and tells no names apart."""
    return ReferenceNotFound("there is no such task, version, alias or file")


def is_task_name(name: str) -> bool:
    """Whether a name may become a folder: no separator, no leading dot, at most 64 characters."""
    return _TASK_NAME.fullmatch(name) is not None


def check_task_name(name: str) -> None:
    if not is_task_name(name):
        raise InvalidRequest(f"a task's name must match {_NAME}", param="task")


def check_alias_name(name: str) -> None:
    if _ALIAS_NAME.fullmatch(name) is None:
        raise InvalidRequest(f"an alias must match {_NAME} and have something beside digits", param="alias")
