"""What requests are counted in: plain numbers, written by the event loop alone and read by whoever scrapes."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Sequence

# Upper bounds in seconds. A step of a small model takes milliseconds, a queue up to the longest deadline.
FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
QUEUE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
REQUEST = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)

ABORT_CAUSES = ("disconnect", "slow_reader", "deadline", "shutdown", "error")
PRUNE_FROM = 64  # tasks; below that nobody looks whether some are gone


class Histogram:
    """Observations by size. Scraped beside an observation, count and buckets agree; the sum may be one apart."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound -> how many observations are not above it; the last bound is +Inf."""
        found, total = [], 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts.copy(), strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class TaskCounts:
    """Of one task, of the bare base model, or of all together."""

    def __init__(self) -> None:
        self.prompt_tokens = 0  # of text that was read
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()  # answers by how they ended


class Counts:
    """Everything since the start. None of it ever falls, but that a task takes its own counts with it."""

    def __init__(self, tasks: Callable[[], Collection[str]]) -> None:
        """`tasks` gives the names that the registry holds."""
        self._names = tasks
        self._by_task: dict[str, TaskCounts] = {}
        self._prune_at = PRUNE_FROM
        self.all = TaskCounts()
        self.first_token = Histogram(FIRST_TOKEN)  # seconds from a request that has been read to the first token
        self.between_tokens = Histogram(BETWEEN_TOKENS)
        self.queue = Histogram(QUEUE)
        self.request = Histogram(REQUEST)  # of those that were answered
        self.replies: Counter[tuple[str, str]] = Counter()  # by operation and status
        self.aborts = Counter(dict.fromkeys(ABORT_CAUSES, 0))
        self.rejected_uploads: Counter[str] = Counter()  # by code

    def of_task(self, name: str) -> TaskCounts:
        """Of a task that the registry held a moment ago; "" is the bare base model."""
        found = self._by_task.get(name)
        if found is None:
            if len(self._by_task) >= self._prune_at:
                names = {"", *self._names()}
                self._by_task = {known: counts for known, counts in self._by_task.items() if known in names}
                self._prune_at = max(PRUNE_FROM, 2 * len(self._by_task))
            found = self._by_task[name] = TaskCounts()
        return found

    def by_task(self) -> dict[str, TaskCounts]:
        """Of the tasks that the registry holds, and of the bare base model."""
        names = {"", *self._names()}
        return {name: counts for name, counts in self._by_task.copy().items() if name in names}
