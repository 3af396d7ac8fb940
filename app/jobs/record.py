"""The record of a job under way, as the run that carries it out changes it: only in the state in which it knows it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from app.errors import NotReady, SoftpromptError, StorageFull
from app.jobs.ending import MAX_MESSAGE, Changed
from app.jobs.job import Job, Status
from app.jobs.store import JobStore, RecordDamaged, Told

logger = logging.getLogger(__name__)
T = TypeVar("T")
Change = Callable[[Job], Job]

RETRY = 1.0  # seconds until a disk that took nothing is asked again


class Record:
    """For one event loop. `job` is as it was last read or written here."""

    def __init__(self, store: JobStore, job: Job) -> None:
        self.job = job
        self.expected: Status = job.status
        self._store = store
        self._stopping = False
        self._threads = anyio.CapacityLimiter(1)  # its own: a disk that hangs holds up nothing else

    def stop(self) -> None:
        """Wait no longer for a disk that takes nothing."""
        self._stopping = True

    async def read(self) -> Job:
        """As it is now, which others may have changed."""
        return await self._in_thread(partial(self._store.get, self.job.id))

    async def advance(self, change: Change) -> None:
        """Raises Changed if the job is no longer in the state in which this run knows it."""
        expected = self.expected

        def decide(job: Job) -> Job:
            if job.status != expected:
                raise Changed
            return change(job)

        self.job = await self._in_thread(partial(self._store.change, self.job.id, decide))

    async def persist(self, change: Change, *told: Told) -> bool:
        """Write how the run ended, as soon as the disk takes it. False if the job is finished, or the run must end."""
        told = tuple((level, message[:MAX_MESSAGE], data) for level, message, data in told)
        is_open = True

        def decide(job: Job) -> Job:
            nonlocal is_open
            is_open = not job.is_finished
            return change(job) if is_open else job

        while True:
            try:
                self.job = await self._in_thread(partial(self._store.change, self.job.id, decide, told))
                return is_open
            except RecordDamaged:
                raise
            except (StorageFull, NotReady) as error:
                logger.warning("the training job %s cannot be written: %s", self.job.id, error.message)
                if self._stopping:
                    return False
                await asyncio.sleep(RETRY)

    async def tell(self, level: Any, message: str, **more: Any) -> None:
        """An event that cannot be written is no reason for a job to end."""
        try:
            tell = partial(self._store.tell, self.job.id, level, message[:MAX_MESSAGE], **more)
            await self._in_thread(tell)
        except SoftpromptError as error:
            logger.warning("an event of %s is lost: %s", self.job.id, error.message)

    async def keep(self, evaluation: dict[str, Any]) -> None:
        """Nor is an evaluation, whose scores are in the job itself."""
        try:
            await self._in_thread(partial(self._store.keep_evaluation, self.job.id, evaluation))
        except SoftpromptError as error:
            logger.warning("the evaluation of %s is lost: %s", self.job.id, error.message)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._threads)
