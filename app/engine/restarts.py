"""How often an engine that dies may start again, and how soon."""

from __future__ import annotations

import time

MAX_RESTARTS = 5  # within WINDOW
WINDOW = 600.0  # seconds
RESTART_DELAY = 1.0  # seconds, doubled with every restart in the window


class Restarts:
    """Counts them; one that fails at once, for ever, must not keep a machine busy."""

    def __init__(self, delay: float) -> None:
        """`delay` in seconds is the first one's."""
        self._delay = delay
        self._times: list[float] = []  # of the restarts, on the monotonic clock
        self.exhausted = False  # or there is no use in another one

    @property
    def count(self) -> int:
        return len(self._times)

    def next_delay(self) -> float | None:
        """Seconds to wait before starting again, which counts as done from here on; None: give up."""
        now = time.monotonic()
        recent = sum(then > now - WINDOW for then in self._times)
        self.exhausted = self.exhausted or recent >= MAX_RESTARTS
        if self.exhausted:
            return None
        self._times.append(now)
        return self._delay * float(2**recent)
