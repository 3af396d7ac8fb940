"""What is known of one request when it has ended: for its log line, the metrics and its span."""

from __future__ import annotations

import time
from collections.abc import Callable

from app.api.counts import Counts, TaskCounts
from app.engine import Token
from app.errors import NotReady, Overloaded, RequestError, RequestTimedOut, SoftpromptError
from app.registry import Version

MAX_REFERENCE = 200  # characters of a name that a client made up


class RequestStats:
    """For the event loop alone."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._read_at = 0.0
        self.reference: str | None = None  # as the request names it
        self.versions: list[Version | None] = []  # None: the bare base model
        self.is_admitted = False  # the engine has taken work for it
        self.is_answered = False  # and has done all of it
        self.cause: str | None = None  # why it ended early, one of ABORT_CAUSES
        self.error_code: str | None = None
        self.num_prompt_tokens = 0  # of text that was read
        self.num_cached_tokens = 0  # of those
        self.num_generated_tokens = 0
        self.finish_reasons: list[str] = []
        self.prompts: list[str] = []  # only where SOFTPROMPT_LOG_PROMPTS asks for them

    def begin(self, reference: str | None) -> None:
        """The request has been read, and is one for the engine."""
        self._read_at = time.monotonic()
        self.reference = None if reference is None else reference[:MAX_REFERENCE]

    def reads(self, version: Version | None, num_tokens: int) -> None:
        """The model has read so many tokens of text behind a version."""
        self.num_prompt_tokens += num_tokens
        for counts in self._counts_of(version):
            counts.prompt_tokens += num_tokens

    def finishes(self, version: Version | None, reason: str) -> None:
        """One answer, or one classification, is complete."""
        self.finish_reasons.append(reason)
        for counts in self._counts_of(version):
            counts.finished[reason] += 1

    def clock(self, version: Version | None, num_prompt_tokens: int) -> Callable[[Token], None]:
        """To be called with every token of an answer as it comes.

        `num_prompt_tokens` count as read with the first one.
        """
        everything, task = self._counts_of(version)
        counts = self._counts
        last = 0.0  # when the token before was made

        def tick(token: Token) -> None:
            nonlocal last
            if token.finish_reason == "abort":
                return
            if last:
                counts.between_tokens.observe(token.made_at - last)
            else:
                counts.first_token.observe(token.made_at - self._read_at)
                counts.queue.observe(token.queue_seconds)
                self.num_cached_tokens += token.num_cached_tokens if num_prompt_tokens else 0
                self.reads(version, num_prompt_tokens)
            last = token.made_at
            if token.id is not None:
                self.num_generated_tokens += 1
                everything.generation_tokens += 1
                task.generation_tokens += 1

        return tick

    def fails(self, error: SoftpromptError) -> None:
        """The client is told of this error, by the reply or in its stream."""
        self.error_code = error.code
        if isinstance(error, RequestTimedOut):
            self.cause = "deadline"
        elif isinstance(error, NotReady):
            self.cause = "shutdown"
        elif not isinstance(error, RequestError | Overloaded):  # those are refusals
            self.cause = "error"

    def ends(self, operation: str, status: int) -> None:
        """Count it, with the status of its reply."""
        self._counts.replies[operation, str(status)] += 1
        if operation == "publish_version" and self.error_code is not None:
            self._counts.rejected_uploads[self.error_code] += 1
        if self.is_admitted and self.cause is not None:
            self._counts.aborts[self.cause] += 1
        elif self.is_answered:
            self._counts.request.observe(time.monotonic() - self._read_at)

    def _counts_of(self, version: Version | None) -> tuple[TaskCounts, TaskCounts]:
        return self._counts.all, self._counts.of_task(version.task if version else "")
