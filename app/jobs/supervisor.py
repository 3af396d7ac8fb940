"""One queue of training jobs for all servers on a folder: what waits is begun, the oldest first.

The job on disk is the truth. A cancelled or paused one is written so by whoever was asked, and the run that has it sees
that. Leases keep every other server away from what runs here, and are gone when this server and its workers are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

import anyio
import anyio.to_thread

from app.errors import SoftpromptError
from app.jobs.job import Job
from app.jobs.lease import Lease
from app.jobs.run import Parts, Run
from app.jobs.store import RecordDamaged

logger = logging.getLogger(__name__)
T = TypeVar("T")

POLL = 1.0  # seconds between two looks at the queue
SWEEP_EVERY = 3600.0  # seconds


class Supervisor:
    """Of one server; for its event loop. It works while `run` does."""

    def __init__(self, parts: Parts, *, sweep: Callable[[], None]) -> None:
        """`sweep` removes what is left over; called now and then, in a thread."""
        self._parts = parts
        self._store = parts.store
        self._sweep = sweep
        self._threads = anyio.CapacityLimiter(1)  # its own: a disk that hangs holds up nothing else
        self._poke = asyncio.Event()
        self._over: set[str] = set()  # jobs that need nothing any more
        self._full: set[str] = set()  # kinds of which an older job found no place in this turn: it comes first
        self._damaged: set[str] = set()  # jobs whose record is, as was said already
        self._running: dict[str, tuple[Run, asyncio.Task[None]]] = {}

    def wake(self) -> None:
        """Something was asked; look now."""
        self._poke.set()

    async def run(self) -> None:
        """Until it is cancelled; then the workers save their state and end, and their jobs are queued again."""
        swept_at = float("-inf")
        self._poke = asyncio.Event()  # of this event loop
        try:
            while True:
                self._poke.clear()
                try:
                    if time.monotonic() - swept_at >= SWEEP_EVERY:
                        swept_at = time.monotonic()
                        await self._in_thread(self._sweep)
                    await self._turn()
                except SoftpromptError as error:
                    logger.warning("training jobs: %s", error.message)
                except Exception:
                    logger.exception("the training jobs could not be looked at")
                try:
                    async with asyncio.timeout(POLL):
                        await self._poke.wait()
                except TimeoutError:
                    pass
        finally:
            for run, _ in self._running.values():
                run.stop()
            await asyncio.gather(*(task for _, task in self._running.values()), return_exceptions=True)

    async def _turn(self) -> None:
        self._full.clear()
        for job_id in reversed(await self._in_thread(self._store.ids)):
            if job_id in self._over or job_id in self._running:
                continue
            try:
                await self._look_at(job_id)
            except RecordDamaged as error:
                if job_id not in self._damaged:  # said once; whoever puts it right has it go on
                    self._damaged.add(job_id)
                    logger.warning("training jobs: %s", error.message)
            except SoftpromptError as error:  # which keeps no other job from its turn
                logger.warning("training jobs: %s", error.message)

    async def _look_at(self, job_id: str) -> None:
        job = await self._in_thread(partial(self._store.get, job_id))
        self._damaged.discard(job_id)
        if job.is_finished:
            await self._tidy(job)
        elif job.status != "paused":
            await self._begin(job)

    async def _begin(self, job: Job) -> None:
        kind, count = ("train", self._parts.settings.max_training_jobs) if job.is_checked else ("check", 1)
        if kind in self._full:
            return
        with ExitStack() as held:
            slot = await self._in_thread(partial(self._store.slot, kind, count))
            if slot is None:
                self._full.add(kind)
                return
            held.callback(slot.release)
            lease = await self._in_thread(partial(self._store.lease, job.id))
            if lease is None:
                return
            held.callback(lease.release)
            # Another server may have had it since it was looked at.
            now = await self._in_thread(partial(self._store.get, job.id))
            if now.status != job.status or now.is_checked != job.is_checked:
                self.wake()
                return
            held.pop_all()  # the run has them now
        run = Run(self._parts, now, [lease.fileno(), slot.fileno()])
        self._running[job.id] = (run, asyncio.create_task(self._carry_out(run, job.id, [lease, slot])))

    async def _carry_out(self, run: Run, job_id: str, leases: list[Lease]) -> None:
        try:
            await run.run()
        except SoftpromptError as error:
            logger.warning("the training job %s: %s", job_id, error.message)
        except Exception:
            logger.exception("the training job %s could not be carried out", job_id)
        finally:
            for lease in leases:
                lease.release()
            del self._running[job_id]
            self.wake()

    async def _tidy(self, job: Job) -> None:
        """Its lease is free once its worker is gone."""
        lease = await self._in_thread(partial(self._store.lease, job.id))
        if lease is not None:
            with lease:
                await self._in_thread(partial(self._store.tidy, job.id))
            self._over.add(job.id)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._threads)
