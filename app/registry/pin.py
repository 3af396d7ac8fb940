"""Who uses which version: a pin is taken when a request is admitted and released when it ends."""

from __future__ import annotations

import threading
from collections import Counter

from app.registry.task import Version
from app.soft_prompt import SoftPrompt


class PinCount:
    """Pins per version; versions without any take no room. Thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, int]] = Counter()
        self._lock = threading.Lock()

    def __getitem__(self, version: Version) -> int:
        with self._lock:
            return self._counts[version.task, version.number]

    def add(self, version: Version) -> None:
        with self._lock:
            self._counts[version.task, version.number] += 1

    def remove(self, version: Version) -> None:
        key = (version.task, version.number)
        with self._lock:
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]


class Pin:
    """A version held by a request; its soft prompt stays even if the version is deleted meanwhile."""

    def __init__(self, version: Version, prompt: SoftPrompt, count: PinCount) -> None:
        """Takes over one count of `version`, which the caller has added."""
        self.version = version
        self.prompt = prompt
        self._count = count
        self._released = threading.Lock()

    def release(self) -> None:
        """Count the version down, once; from any thread, any number of times."""
        if self._released.acquire(blocking=False):
            self._count.remove(self.version)
