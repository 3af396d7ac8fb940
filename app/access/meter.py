"""How fast one key may go, and how fast it goes now. Known to this process alone, but for the tokens of a day."""

from __future__ import annotations

import math
from collections.abc import Callable

from app.access.bucket import TINY, Bucket
from app.access.key import Key
from app.access.place import Place
from app.access.usage import Usage
from app.errors import RateLimited

LIMITED = ("requests", "tokens", "tokens-day", "parallel")  # in the names of headers
BUSY_SECONDS = 1  # when to ask again for one of the places, of which nobody knows when they are given back


class Meter:
    """For the event loop alone."""

    def __init__(self, key: Key, usage: Usage, clock: Callable[[], float]) -> None:
        self._key = key
        self._usage = usage
        limits = key.limits
        self._requests = limits.requests_per_minute and Bucket(limits.requests_per_minute, clock)
        self._tokens = limits.tokens_per_minute and Bucket(limits.tokens_per_minute, clock)
        self._inside = 0

    def admit(self, *, generates: bool) -> Place:
        """Count a request in and give it a place, or neither. `generates`: it will spend tokens.

        Raises RateLimited.
        """
        limits = self._key.limits
        if self._requests and (wait := self._requests.seconds_until(1)):
            raise _limited(f"{limits.requests_per_minute} requests a minute", wait)
        if generates and self._tokens and (wait := self._tokens.seconds_until(1)):
            raise _limited(f"{limits.tokens_per_minute} tokens a minute", wait)
        if generates and limits.tokens_per_day and self._usage.of(self._key.id) >= limits.tokens_per_day:
            raise _limited(f"{limits.tokens_per_day} tokens a day", self._usage.seconds_left)
        if limits.max_parallel and self._inside >= limits.max_parallel:
            raise _limited(f"{limits.max_parallel} requests at once", BUSY_SECONDS)
        if self._requests:
            self._requests.spend(1)
        self._inside += 1
        return Place(self._leave)

    def spend(self, tokens: int) -> None:
        """Tokens that were really read and written."""
        if self._tokens:
            self._tokens.spend(tokens)
        if self._key.is_stored:
            self._usage.add(self._key.id, tokens)

    def headers(self) -> dict[str, str]:
        """As OpenAI names them: the limit, what is left of it now, and how long until all of it is back.

        Nobody knows the last of places for parallel requests.
        """
        found: dict[str, str] = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket:
                found |= _headers(name, bucket.capacity, bucket.level + TINY)
                found[f"x-ratelimit-reset-{name}"] = duration(bucket.seconds_until(bucket.capacity))
        limits = self._key.limits
        if limits.tokens_per_day:
            found |= _headers("tokens-day", limits.tokens_per_day, limits.tokens_per_day - self._usage.of(self._key.id))
            found["x-ratelimit-reset-tokens-day"] = duration(self._usage.seconds_left)
        if limits.max_parallel:
            found |= _headers("parallel", limits.max_parallel, limits.max_parallel - self._inside)
        return found

    def _leave(self) -> None:
        self._inside -= 1


def duration(seconds: float) -> str:
    """As Go writes it, and OpenAI with it: 20ms, 1.5s, 6m0s, 1h0m0s. Rounded up to a millisecond."""
    milliseconds = math.ceil(round(seconds * 1000, 3))
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    shown = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + shown


def _headers(name: str, limit: int, left: float) -> dict[str, str]:
    return {f"x-ratelimit-limit-{name}": str(limit), f"x-ratelimit-remaining-{name}": str(max(0, math.floor(left)))}


def _limited(limit: str, wait: float) -> RateLimited:
    return RateLimited(f"this key may have {limit}", retry_after=max(1, math.ceil(wait)))
