"""One action of one job, carried out here: a worker started, heard, watched and ended, and the job moved along.

Whatever happens to it, the job's record says what is to be done next; so a server that dies needs no last words.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from app.access import Access, AuditEntry
from app.base_model import BaseModel
from app.config import Settings
from app.errors import NumericalError, PermissionDenied, RequestError, SoftpromptError, StorageFull
from app.jobs.ending import Changed, Crashed, Failed, Refused
from app.jobs.gate import Decision
from app.jobs.job import Job, JobError
from app.jobs.moves import failed, halted, requeued, stepped, succeeded, trained
from app.jobs.owner import check_owner
from app.jobs.publisher import Publisher
from app.jobs.record import Record
from app.jobs.store import INITIAL, LOG, TRAINING, VALIDATION, WORK, JobStore, Told
from app.jobs.worker import COMMAND, ENDINGS, Bounds, Worker

logger = logging.getLogger(__name__)
Action = Literal["check", "train"]

POLL = 1.0  # seconds between two looks at what is asked of a job under way
SAVE_EVERY = 2.0  # seconds between two notes of how far it is
GRACE = 15.0  # seconds a worker gets to save its state
MAX_CRASHES = 3  # in a row, without a step forward


@dataclass(frozen=True)
class Parts:
    """What a run works with."""

    settings: Settings
    store: JobStore
    access: Access
    base: BaseModel
    publisher: Publisher


class Run:
    """For one event loop. Who starts it holds the job's lease, and gives it up after it."""

    def __init__(self, parts: Parts, job: Job, leases: Sequence[int]) -> None:
        """`leases` are descriptors for the worker to share."""
        self._settings = parts.settings
        self._store = parts.store
        self._access = parts.access
        self._base = parts.base
        self._publisher = parts.publisher
        self._leases = leases
        self._record = Record(parts.store, job)
        self._stopping = False
        self._watched_at = self._saved_at = float("-inf")

    def stop(self) -> None:
        """End soon, with the job to go on later."""
        self._stopping = True
        self._record.stop()

    async def run(self) -> None:
        """Until the job is to do something else, or nothing more. Raises SoftpromptError if that cannot be written."""
        try:
            await (self._train() if self._record.job.is_checked else self._check())
        except Changed:
            # NOTE: without an expectation: by now it may be cancelled or paused, which stays.
            await self._record.persist(requeued)
        except Failed as failure:
            error = failure.error
            if isinstance(failure, Refused):
                await self._tell_problems(failure)
            told: Told = ("error", f"The job failed: {error.message}", {"code": error.code})
            await self._record.persist(partial(failed, error=error, now=int(time.time())), told)
        except StorageFull as error:
            # Nothing is lost: whoever makes room can resume it.
            await self._record.persist(halted, ("error", f"The job is paused: {error.message}", None))
        except Crashed as crash:
            await self._crashed(str(crash))
        except SoftpromptError:
            raise
        except Exception as error:  # a bug of ours: without a count the job would begin again for ever
            logger.exception("the training job %s met an error that nobody foresaw", self._record.job.id)
            await self._crashed(f"there was an internal error ({type(error).__name__})")

    async def _check(self) -> None:
        await self._record.tell("info", f"Validating training file: {self._record.job.training_file}")
        found = await self._work("check")
        report, steps = found["report"], found["max_steps"]
        for warning in report.get("warnings", []):
            await self._record.tell("warn", warning)
        await self._record.tell("info", "Files validated, moving job to queued state", data=report)
        await self._record.advance(
            lambda job: replace(job, status="queued", is_checked=True, data=report, max_steps=steps)
        )

    async def _train(self) -> None:
        started = self._record.job.started_at or int(time.time())
        await self._record.advance(lambda job: replace(job, status="running", started_at=started, is_publishing=False))
        self._record.expected = "running"
        await self._record.tell(
            "info", "Fine-tuning job goes on" if self._record.job.step else "Fine-tuning job started"
        )
        report = (await self._work("train"))["report"]
        await self._record.advance(partial(trained, report=report))
        await self._record.tell(
            "info", "Training has ended; the result is being scored", data={"stopped": report["stopped"]}
        )
        await self._publish()

    async def _publish(self) -> None:
        job = self._record.job

        async def begin(decision: Decision) -> None:
            self._check_owner()
            await self._record.advance(lambda job: replace(job, is_publishing=True, decided=decision.as_dict()))

        work = self._store.folder(job.id) / WORK
        publishing = asyncio.create_task(self._publisher.publish(job, work, begin=begin))
        try:
            while not (await asyncio.wait([publishing], timeout=POLL))[0]:
                if not self._record.job.is_publishing:
                    await self._watch()
            reference, result, evaluation = publishing.result()
        except (NumericalError, RequestError) as error:
            raise Failed(error.code, error.message) from None
        except StorageFull:
            raise
        except SoftpromptError as error:
            raise Crashed(f"the result could not be published: {error.message}") from None
        finally:
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
        entry = AuditEntry.now(
            request_id=job.id, key_id=job.owner, action="publish_version", target=reference, status=201
        )
        self._access.audit(entry)
        await self._record.keep(evaluation)
        told: list[Told] = []
        gate = result["gate"]
        if gate is not None:
            verb = "was moved" if gate["moved"] else "was not moved"
            told.append(("info", f"The alias {gate['alias']} {verb}: {gate['reason']}", gate))
        told.append(("info", f"New fine-tuned model created: {reference}", None))
        told.append(("info", "The job has successfully completed", None))
        await self._record.persist(partial(succeeded, reference=reference, result=result, now=int(time.time())), *told)

    async def _work(self, action: Action) -> dict[str, Any]:
        """Run a worker to its end and return its last message.

        Raises Failed, Crashed and StorageFull, and Changed if the job is to stop, always after the worker's end.
        """
        self._check_owner()
        settings, folder = self._settings, self._store.folder(self._record.job.id)
        bounds = Bounds(settings.training_threads, settings.training_nice, settings.training_memory_bytes)
        try:
            worker = await Worker.start(COMMAND, self._order(action), folder / LOG, bounds, self._leases)
        except OSError as error:
            raise Crashed(f"no worker could be started: {error.strerror}") from None
        last: dict[str, Any] | None = None
        grace = 0.0
        try:
            last = await self._listen(worker)
            grace = GRACE
        except (Changed, Failed):
            worker.terminate()
            grace = GRACE
            raise
        finally:
            status = await worker.end(grace)
        return self._outcome(last, status)

    async def _listen(self, worker: Worker) -> dict[str, Any] | None:
        """The last message; None if there was none."""
        begun_at = heard_at = time.monotonic()
        before = self._record.job.seconds
        while True:
            try:
                message = await worker.message(POLL)
            except TimeoutError:
                message = {}
            now = time.monotonic()
            if message is None or message.get("kind") in ENDINGS:
                return message
            if message:
                heard_at = now
            elif now - heard_at > self._settings.training_silence:
                raise Crashed("the worker was silent for too long and was killed")
            if message.get("kind") == "step":
                await self._note_step(message, before + now - begun_at)
            if before + now - begun_at > self._settings.training_timeout:
                raise Failed("timeout", f"the job took more than {self._settings.training_timeout:.0f} seconds")
            await self._watch()

    def _outcome(self, last: dict[str, Any] | None, status: int) -> dict[str, Any]:
        if last is None:
            raise Crashed(f"the worker ended with status {status}")
        match last["kind"]:
            case "refused":
                raise Refused(last)
            case "failed":
                raise Failed(last["code"], last["message"])
            case "full":
                raise StorageFull("the storage of training jobs is full")
            case "stopped":
                raise Changed
        return last

    async def _note_step(self, step: dict[str, Any], seconds: float) -> None:
        validated = step["validation_loss"] is not None
        now = time.monotonic()
        if not validated and now - self._saved_at < SAVE_EVERY:
            return
        self._saved_at = now
        left = (step["max_steps"] - step["step"]) * step["seconds"] / max(1, step["step"])
        await self._record.advance(partial(stepped, step=step, seconds=seconds, finish=int(time.time() + left)))
        if validated:
            metrics = {
                "step": step["step"],
                "total_steps": step["max_steps"],
                "train_loss": step["train_loss"],
                "valid_loss": step["validation_loss"],
            }
            told = f"Step {step['step']}/{step['max_steps']}: training loss={step['train_loss']:.4f}, validation loss="
            await self._record.tell("info", f"{told}{step['validation_loss']:.4f}", metrics=metrics)

    async def _watch(self) -> None:
        """Raises Changed if the job is to stop, and Failed if its owner may no longer have it."""
        if self._stopping:
            raise Changed
        now = time.monotonic()
        if now - self._watched_at < POLL:
            return
        self._watched_at = now
        job = await self._record.read()
        if job.status != self._record.expected:
            raise Changed
        self._check_owner()

    def _check_owner(self) -> None:
        try:
            check_owner(self._access, self._record.job)
        except PermissionDenied as error:
            raise Failed(error.code, error.message) from None

    async def _tell_problems(self, refusal: Refused) -> None:
        for problem in refusal.problems:
            where = f"{problem['file']}, line {problem['line']}"
            await self._record.tell("error", f"{where}: {problem['message']}", data=problem)
        found = {"problems": refusal.problems, "problem_counts": refusal.counts}
        await self._record.persist(lambda job: replace(job, data=found))

    async def _crashed(self, why: str) -> None:
        def count(job: Job) -> Job:
            crashes = job.crashes + 1 if job.step <= job.crash_step else 1
            return replace(requeued(job), crashes=crashes, crash_step=job.step)

        if not await self._record.persist(count):
            return
        if self._record.job.crashes < MAX_CRASHES:
            await self._record.tell("warn", f"The job is started again: {why}")
            return
        message = f"it was started {MAX_CRASHES} times and got no further; the last time {why}"
        error = JobError("training_crashed", message)
        told: Told = ("error", f"The job failed: {message}", None)
        await self._record.persist(partial(failed, error=error, now=int(time.time())), told)

    def _order(self, action: Action) -> dict[str, Any]:
        job, base, settings = self._record.job, self._base, self._settings
        folder = self._store.folder(job.id).absolute()

        def path(name: str) -> str | None:
            return str(folder / name) if (folder / name).exists() else None

        return {
            "action": action,
            "training": path(TRAINING),
            "validation": path(VALIDATION),
            "initial": path(INITIAL),
            "work": str(folder / WORK),
            "seed": job.seed,
            "options": vars(job.options),
            "base": {
                "path": str(base.path.absolute()),
                "cache_dir": str(Path(settings.cache_dir).absolute()),
                "name": base.info.name,
                "fingerprint": base.info.fingerprint,
                "max_model_len": base.info.max_model_len,
                "device": str(base.device),
                "dtype": str(base.dtype).removeprefix("torch."),
            },
        }
