"""Files of versions that do not match their digests: each is logged once, however many requests meet it."""

from __future__ import annotations

import logging
import threading

from app.registry.task import Version

logger = logging.getLogger(__name__)


class Quarantine:
    """The damage that is known. Nothing is moved or removed: it is the operator's to look at. Thread-safe."""

    def __init__(self) -> None:
        self._files: set[tuple[str, int, str]] = set()
        self._lock = threading.Lock()

    def add(self, version: Version, name: str) -> None:
        """The file `name` was read and is not what was published."""
        key = (version.task, version.number, name)
        with self._lock:
            known = key in self._files
            self._files.add(key)
        if not known:
            logger.error("%s: %s does not match its digest; it is not served", version.reference, name)

    def lift(self, version: Version, *names: str) -> None:
        """The files `names` are whole, or the version is gone."""
        with self._lock:
            self._files.difference_update((version.task, version.number, name) for name in names)
