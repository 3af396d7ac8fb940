"""Whether whoever asked for a job may still have it: judged when it begins, while it runs, and before it publishes."""

from __future__ import annotations

from app.access import Access, Caller
from app.errors import PermissionDenied
from app.jobs.job import Job
from app.registry import DEFAULT_ALIAS


def check_owner(access: Access, job: Job) -> None:
    """Raises PermissionDenied if the key was revoked, has expired, or may not publish to this task any more."""
    caller = access.holder(job.owner)
    if caller is None:
        raise PermissionDenied("the key that the job was created with is no longer valid")
    check_publishing(caller, job.options.alias)
    if not caller.sees(job.task):
        raise PermissionDenied("the key that the job was created with no longer has this task")


def check_publishing(caller: Caller, alias: str) -> None:
    """What a job needs beyond its task, at any time. Raises PermissionDenied."""
    caller.check_scope("jobs")
    if alias not in ("", DEFAULT_ALIAS):
        caller.check_scope("aliases:write")
