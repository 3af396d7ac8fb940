"""What is known of one request when it has ended: for its log line, the metrics and its span."""

from __future__ import annotations

import time
from collections.abc import Callable

from app.api.counts import Counts, TaskCounts
from app.engine import Token
from app.errors import NotReady, Overloaded, RequestError, RequestTimedOut, SoftpromptError
from app.registry import Version

MAX_REFERENCE = 200  # characters of a name that a client made up


class Unread:
    """The tokens of one input, which count once however many answers it has."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def take(self) -> int:
        """All of them the first time, none after that."""
        taken, self._num_tokens = self._num_tokens, 0
        return taken


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

    def clock(self, version: Version | None, text: Unread) -> Callable[[Token], None]:
        """To be called with every token of an answer as it comes; with the first one `text` has been read."""
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
                if num_tokens := text.take():
                    self.num_cached_tokens += token.num_cached_tokens
                    self.reads(version, num_tokens)
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
            # Before that it is a refusal: keys that cannot be checked, a folder that cannot be read.
            self.cause = "shutdown" if self.is_admitted else None
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
