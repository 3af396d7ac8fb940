"""What a run makes of a job's record: functions of the job alone, for `JobStore.change`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from app.jobs.job import Job, JobError


def requeued(job: Job) -> Job:
    """To go on later; what is paused or over stays so."""
    if job.status != "running":
        return job
    return replace(job, status="queued", is_publishing=False, estimated_finish=None)


def halted(job: Job) -> Job:
    return replace(job, status="paused", is_publishing=False, estimated_finish=None)


def failed(job: Job, *, error: JobError, now: int) -> Job:
    over = replace(job, status="failed", error=error, finished_at=now)
    return replace(over, is_publishing=False, estimated_finish=None)


def stepped(job: Job, *, step: dict[str, Any], seconds: float, finish: int) -> Job:
    return replace(
        job,
        step=step["step"],
        max_steps=step["max_steps"],
        trained_tokens=step["trained_tokens"],
        seconds=seconds,
        estimated_finish=finish,
        crashes=0 if step["step"] > job.crash_step else job.crashes,
    )


def trained(job: Job, *, report: dict[str, Any]) -> Job:
    return replace(job, step=report["steps"], trained_tokens=report["trained_tokens"], report=report)


def succeeded(job: Job, *, reference: str, result: dict[str, Any], now: int) -> Job:
    over = replace(job, status="succeeded", fine_tuned_model=reference, result=result, finished_at=now)
    return replace(over, is_publishing=False, estimated_finish=None)
