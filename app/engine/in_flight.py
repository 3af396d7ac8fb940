"""How many requests are in flight, and whether there is room for another."""

from __future__ import annotations

from collections import Counter

from app.errors import Overloaded

# One prompt's requests may be so many times those that there is room left for (Choudhury and Hahne 1998, dynamic
# thresholds): alone it gets nearly all the room, and whoever comes next still finds some.
MAX_SHARE = 8


class InFlight:
    """Not thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counts: Counter[str | None] = Counter()  # by the prompt's digest, without zeros

    def check(self, digest: str | None, *, ahead: int = 0) -> None:
        """Raise Overloaded if another one behind that prompt would be too many, were `ahead` others let in before."""
        room = self._limit - self._counts.total() - ahead
        if room <= 0:
            raise Overloaded(f"{self._limit} requests are in flight, which is the limit")
        if self._counts[digest] >= MAX_SHARE * room:
            raise Overloaded("too many requests for this prompt are in flight for the room that is left")

    @property
    def max_alone(self) -> int:
        """So many behind one prompt are let in where there are no others, and behind several prompts no fewer."""
        return -(-MAX_SHARE * self._limit // (MAX_SHARE + 1))

    def add(self, digest: str | None) -> None:
        self._counts[digest] += 1

    def remove(self, digest: str | None) -> None:
        self._counts[digest] -= 1
        if not self._counts[digest]:
            del self._counts[digest]
