"""A token bucket: a rate with a burst of one minute's worth."""

from __future__ import annotations

from collections.abc import Callable

MINUTE = 60.0  # seconds
TINY = 1e-6  # what sums of floats may miss a whole number by


class Bucket:
    """Fills steadily to `per_minute`. What is not known beforehand may be spent afterwards, into debt."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        """`clock` gives seconds and never goes back."""
        self.capacity = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._filled_at = clock()

    @property
    def level(self) -> float:
        now = self._clock()
        self._level = min(self.capacity, self._level + (now - self._filled_at) * self.capacity / MINUTE)
        self._filled_at = now
        return self._level

    def spend(self, amount: int) -> None:
        self._level = self.level - amount

    def seconds_until(self, level: float) -> float:
        """0 if there is as much already."""
        missing = level - self.level
        return missing * MINUTE / self.capacity if missing > TINY else 0.0
