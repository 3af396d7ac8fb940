"""How a piece of work on a job ended, if it did not end well. Whoever runs the job knows what becomes of it."""

from __future__ import annotations

from typing import Any

from app.jobs.job import JobError

MAX_MESSAGE = 2_000  # characters


class Changed(Exception):
    """The job is no longer to be run here and now: cancelled, paused, or the server ends."""


class Failed(Exception):
    """The job is at its end."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.error = JobError(code, message[:MAX_MESSAGE], param)


class Refused(Failed):
    """By the check of its data."""

    def __init__(self, found: dict[str, Any]) -> None:
        super().__init__(found["code"], found["message"], found["param"])
        self.problems: list[dict[str, Any]] = found["problems"]
        self.counts: dict[str, int] = found["counts"]


class Crashed(Exception):
    """The worker ended without a word, or had to be killed; another one may get further."""
