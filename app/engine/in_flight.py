"""How many requests are in flight, and whether there is room for another."""

from __future__ import annotations

from collections import Counter

from app.errors import Overloaded
from app.soft_prompt import SoftPrompt

# One prompt's requests may be so many times those that there is room left for (Choudhury and Hahne 1998, dynamic
# thresholds): alone it gets nearly all the room, and whoever comes next still finds some.
MAX_SHARE = 8


class InFlight:
    """Not thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counts: Counter[str | None] = Counter()  # by prompt, without zeros

    def check(self, prompt: SoftPrompt | None, *, ahead: int = 0) -> None:
        """Raise Overloaded if another one behind `prompt` would be too many, were `ahead` others let in before it."""
        room = self._limit - self._counts.total() - ahead
        if room <= 0:
            raise Overloaded(f"{self._limit} requests are in flight, which is the limit")
        if self._counts[_lane(prompt)] >= MAX_SHARE * room:
            raise Overloaded("too many requests for this prompt are in flight for the room that is left")

    def add(self, prompt: SoftPrompt | None) -> None:
        self._counts[_lane(prompt)] += 1

    def remove(self, prompt: SoftPrompt | None) -> None:
        lane = _lane(prompt)
        self._counts[lane] -= 1
        if not self._counts[lane]:
            del self._counts[lane]


def _lane(prompt: SoftPrompt | None) -> str | None:
    return prompt.digest if prompt else None
