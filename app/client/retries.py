"""When a call is made again, and after how long."""

from __future__ import annotations

import random
from dataclasses import dataclass

from app.client.errors import ClientError, ConnectionFailed, RateLimited, Unavailable


@dataclass(frozen=True)
class Retries:
    """Exponential back-off with jitter; a server's Retry-After is honoured, one beyond `longest` is not waited for.

    Made again is what the server did not take (no connection, 429, 503), and after a lost reply only what may be done
    twice. What ran out of time is not: the server may still be at it.
    """

    most: int = 4  # after the first try
    first: float = 0.5  # seconds; doubles each time
    longest: float = 30.0  # seconds

    def wait(self, error: ClientError, attempt: int, *, repeatable: bool) -> float | None:
        """Seconds until the next try after `attempt` retries; None: it is final."""
        if attempt >= self.most:
            return None
        if isinstance(error, ConnectionFailed):
            if error.sent and not repeatable:
                return None
        elif not isinstance(error, RateLimited | Unavailable) or error.code == "prompt_corrupt":
            return None
        if error.retry_after is not None:
            # Never sooner than asked, and not everybody at once.
            return error.retry_after + random.uniform(0, self.first) if error.retry_after <= self.longest else None
        return min(self.longest, self.first * 2.0**attempt) * random.uniform(0.5, 1)
