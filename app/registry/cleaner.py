"""What goes from a store for good: files of versions deleted long ago, and what writers that died have left."""

from __future__ import annotations

import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from functools import partial

from app.errors import ServerError
from app.registry import changes
from app.registry.index import Index
from app.registry.pin import PinCount
from app.registry.store import Store
from app.registry.task import TaskState

logger = logging.getLogger(__name__)


class Cleaner:
    """Removes it. Each task is on its own: one that cannot be cleaned costs no other its turn. Thread-safe."""

    def __init__(self, store: Store, index: Index, pins: PinCount) -> None:
        self._store = store
        self._index = index
        self._pins = pins
        self._sweeping = threading.Lock()
        self._unwanted_since: dict[tuple[str, int], float] = {}  # task and number of a folder -> monotonic time

    def collect(self, retention: float) -> list[str]:
        """See `Registry.collect`."""
        before = datetime.now(UTC) - timedelta(seconds=retention)
        collected: list[str] = []
        for state in self._index.states():
            try:
                self._collect_task(state, before, collected)
            except ServerError as error:
                logger.warning("deleted versions of %s stay: %s", state.task.name, error.message)
        return collected

    def sweep(self, grace: float, retention: float) -> int:
        """See `Registry.sweep`."""
        removed = 0
        with self._sweeping:
            try:
                for task in self._store.tasks():
                    try:
                        removed += self._sweep_task(task, grace, retention)
                    except ServerError as error:
                        logger.warning("the leftovers of %s stay: %s", task, error.message)
            except ServerError as error:
                logger.warning("the registry could not be swept: %s", error.message)
        return removed

    def _collect_task(self, state: TaskState, before: datetime, collected: list[str]) -> None:
        for number, deleted in state.deleted.items():
            if self._pins[deleted.version] or not changes.is_due(deleted, before):
                continue
            after = self._index.commit(
                state.task.name, partial(changes.collect_version, number=number, deleted_before=before), "collector"
            )
            # NOTE: files only go once the log says so: a restored version must have its own.
            if number not in after.deleted and number not in after.task.versions:
                self._store.remove_version(state.task.name, number)
                collected.append(deleted.version.reference)

    def _sweep_task(self, task: str, grace: float, retention: float) -> int:
        numbers = self._store.numbers(task)
        state = self._index.catch_up(task)
        unwanted = numbers - state.task.versions.keys() - state.deleted.keys()
        if not state.head.seq:
            # NOTE: the log may be what was lost, or a backup that is put back may not have brought it yet.
            unwanted = frozenset()
        # NOTE: not by the age of the files: those of a version whose entry was lost may be years old.
        now = time.monotonic()
        for key in [key for key in self._unwanted_since if key[0] == task and key[1] not in unwanted]:
            del self._unwanted_since[key]
        since = {number: self._unwanted_since.setdefault((task, number), now) for number in unwanted}
        doomed = [number for number, first in since.items() if now - first >= retention]
        if doomed:
            # NOTE: or the power could take back the entry that let them go, and not their removal.
            self._store.settle(task)
        return self._store.sweep(task, doomed, now=time.time(), grace=grace)
