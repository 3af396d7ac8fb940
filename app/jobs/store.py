"""Jobs on disk: a folder each, with the job, its events, its data and what its worker keeps between two runs."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.errors import NotReady, Overloaded, RateLimited, ReferenceNotFound, StorageFull
from app.jobs.folders import Folders
from app.jobs.job import ACTIVE, Event, Job, Level
from app.jobs.lease import Lease
from app.jobs.names import unknown
from app.registry.durable import FileSystem, storage_errors

logger = logging.getLogger(__name__)

MAX_EVENTS = 5_000  # of one job; only messages come after as many metrics
MAX_FINISHED = 1_000  # jobs that are remembered
MAX_OF_TENANT = 16  # jobs of one tenant that are not finished
RETRY_AFTER = 60  # seconds
JOB, EVENTS = "job.json", "events.jsonl"
EVALUATION = "evaluation.json"  # stays, as the other two do
TRAINING, VALIDATION, INITIAL = "training.jsonl", "validation.jsonl", "initial.safetensors"
WORK = "work"  # the worker's own folder
LOG = "worker.log"

Told = tuple[Level, str, dict[str, Any] | None]  # what an event says, and its data


class RecordDamaged(NotReady):
    """A job's file is no job. Asking again is no use: somebody has to put it right."""


class JobStore:
    """Thread-safe, and shared with other processes over the same folder. Every call blocks; see `Folders`."""

    def __init__(self, root: Path, *, max_active: int, fs: FileSystem | None = None) -> None:
        """`max_active` is how many jobs may be unfinished at once."""
        self._folders = Folders(root, "ftjob", fs)
        self._max_active = max_active
        self._creating = threading.Lock()

    def create(self, job: Job, training: Path, validation: Path | None, initial: bytes | None) -> None:
        """Durable on return. The files are linked, so that nobody can take them away from the job.

        Raises RateLimited and Overloaded where there are too many, ReferenceNotFound for a file that is gone.
        """
        links = {TRAINING: training} | ({VALIDATION: validation} if validation is not None else {})
        fs = self._folders.fs

        def fill(draft: Path) -> None:
            for name, source in links.items():
                try:
                    fs.link(source, draft / name)
                except FileNotFoundError:
                    raise unknown("file") from None
            if initial is not None:
                fs.write_file(draft / INITIAL, initial)
            fs.write_file(draft / JOB, job.to_json())
            fs.write_file(draft / EVENTS, _line(job.id, 1, "info", "Created fine-tuning job"))

        with self._creating:
            active = [other for other in self.all() if not other.is_finished]
            if sum(other.tenant == job.tenant for other in active) >= MAX_OF_TENANT:
                raise RateLimited(f"{MAX_OF_TENANT} jobs may be unfinished at once", retry_after=RETRY_AFTER)
            if len(active) >= self._max_active:
                raise Overloaded("too many training jobs wait for their turn")
            self._folders.create(job.id, fill)

    def ids(self) -> list[str]:
        """The newest first."""
        return self._folders.ids()

    def all(self) -> list[Job]:
        """The newest first, without those whose file is damaged."""
        found = []
        for item in self.ids():
            try:
                found.append(self.get(item))
            except ReferenceNotFound:  # pruned since
                continue
            except NotReady as error:
                logger.warning("%s", error.message)
        return found

    def get(self, job_id: str) -> Job:
        """Raises ReferenceNotFound, and RecordDamaged if its file is damaged."""
        data = self._folders.read(job_id, JOB)
        if data is None:
            raise unknown("ftjob")
        try:
            return Job.from_json(data)
        except ValueError:
            raise RecordDamaged(f"the record of the job {job_id} is damaged") from None

    def counts(self) -> dict[str, int]:
        """How many jobs there are by status, of those that are not finished; for metrics."""
        found = Counter(job.status for job in self.all())
        return {status: found[status] for status in ACTIVE}

    def change(self, job_id: str, decide: Callable[[Job], Job], told: Sequence[Told] = ()) -> Job:
        """Put what `decide` makes of the job in its place, durably; what it raises is passed on and changes nothing.

        Who sees the change finds the events that are `told` of it. They do not stop it if they cannot be written, and
        are not written again if it cannot and is tried again. A process that dies between may have told them in vain.
        """
        with self._locked(job_id):
            before = self.get(job_id)
            after = decide(before)
            if after != before:
                try:
                    self._tell_once(job_id, told)
                except (StorageFull, NotReady) as error:
                    logger.warning("events of %s are lost: %s", job_id, error.message)
                self._folders.replace(job_id, JOB, after.to_json())
            return after

    def tell(
        self,
        job_id: str,
        level: Level,
        message: str,
        *,
        metrics: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        """Add an event; `metrics` make it one of OpenAI's type "metrics"."""
        with self._locked(job_id):
            self._add(job_id, level, message, metrics, data)

    def _tell_once(self, job_id: str, told: Sequence[Told]) -> None:
        last = [[event.level, event.message, event.data] for event in self.events(job_id)[: len(told)]]
        if last[::-1] != json.loads(json.dumps(told)):
            for level, message, data in told:
                self._add(job_id, level, message, None, data)

    def _add(
        self, job_id: str, level: Level, message: str, metrics: dict[str, Any] | None, data: dict[str, Any] | None
    ) -> None:
        """Under the job's lock."""
        with storage_errors():
            path = self._folders.path(job_id) / EVENTS
            lines = _lines(path.read_bytes())
            if metrics is not None and len(lines) >= MAX_EVENTS:
                return
            with path.open("r+b") as file:
                # NOTE: what a writer that died left of a line is overwritten: it was never told to anybody.
                file.seek(sum(len(line) + 1 for line in lines))
                file.truncate()
                file.write(_line(job_id, len(lines) + 1, level, message, metrics, data))
                file.flush()
                os.fsync(file.fileno())

    def events(self, job_id: str) -> list[Event]:
        """The newest first."""
        data = self._folders.read(job_id, EVENTS)
        if data is None:
            raise unknown("ftjob")
        found = []
        for line in reversed(_lines(data)):
            try:
                found.append(Event(**json.loads(line)))
            except (ValueError, TypeError):
                logger.warning("an event of %s is damaged", job_id)
        return found

    def keep_evaluation(self, job_id: str, evaluation: dict[str, Any]) -> None:
        """What was measured of the job's result, durably; beside the job, which is read far more often."""
        self._folders.replace(job_id, EVALUATION, json.dumps(evaluation, allow_nan=False).encode())

    def evaluation(self, job_id: str) -> dict[str, Any] | None:
        """None if the job has none, or a damaged one."""
        data = self._folders.read(job_id, EVALUATION)
        try:
            found = None if data is None else json.loads(data)
        except ValueError:
            found = {}
        if found is None or (isinstance(found, dict) and found.keys() >= {"name", "rows", "scores"}):
            return found
        logger.warning("the evaluation of %s is damaged", job_id)
        return None

    def folder(self, job_id: str) -> Path:
        return self._folders.path(job_id)

    def lease(self, job_id: str) -> Lease | None:
        """What whoever runs the job must hold; None if another process does."""
        with storage_errors():
            try:
                return Lease.take(self._folders.path(job_id) / "lease")
            except FileNotFoundError:
                return None  # pruned since

    def slot(self, kind: str, count: int) -> Lease | None:
        """One of the places of all servers on this folder; None if none is free."""
        with storage_errors():
            for number in range(count):
                lease = Lease.take(self._folders.root / f".{kind}-{number}")
                if lease is not None:
                    return lease
        return None

    def tidy(self, job_id: str) -> None:
        """Of a finished job the story stays, and its data goes. For whoever holds its lease."""
        folder, fs = self._folders.path(job_id), self._folders.fs
        with storage_errors():
            for name in (WORK, TRAINING, VALIDATION, INITIAL, LOG):
                try:
                    fs.remove(folder / name)
                except FileNotFoundError:
                    continue

    def sweep(self) -> None:
        """Forget the oldest finished jobs, and remove what writers that died have left."""
        for job in [job for job in self.all() if job.is_finished][MAX_FINISHED:]:
            self._folders.remove(job.id)
        self._folders.sweep()

    @contextmanager
    def _locked(self, job_id: str) -> Iterator[None]:
        """Against other processes and other threads: each opens the file anew."""
        try:
            with storage_errors():
                lease = Lease.take(self._folders.path(job_id) / "lock", wait=True)
        except NotReady as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise unknown("ftjob") from None
            raise
        assert lease is not None
        with lease:
            yield


def _line(
    job_id: str,
    number: int,
    level: Level,
    message: str,
    metrics: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
) -> bytes:
    """An event as it is stored."""
    kind: Any = "message" if metrics is None else "metrics"
    event = Event(f"ftevent-{job_id[6:]}-{number:06d}", int(time.time()), level, message, kind, metrics or data)
    return json.dumps(asdict(event), allow_nan=False).encode() + b"\n"


def _lines(data: bytes) -> list[bytes]:
    """Whole ones."""
    return data.split(b"\n")[:-1]
