"""The page about a job that has succeeded: what was measured of its result on the validation rows."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from app.errors import InvalidRequest
from app.jobs.job import Job
from app.train.html_report import Report, render


def page(job: Job, evaluation: dict[str, Any] | None) -> str:
    """HTML. Of a job that was finished before evaluations were kept there is what the job itself has.

    Raises InvalidRequest unless the job has succeeded.
    """
    if job.status != "succeeded":
        message = f"only a job that has succeeded has a report; this one is {job.status}"
        raise InvalidRequest(message, code="invalid_job_state")
    measured = job.result["metrics"]
    if evaluation is None:
        evaluation = {"name": job.fine_tuned_model, "rows": measured["rows"], "scores": measured["soft_prompt"]}
    facts: dict[str, object] = {
        "Version": job.fine_tuned_model,
        "Description": job.options.description,
        "Job": job.id,
        "Started from": job.model,
        "Rows": f"{measured['rows']} of {measured['split']}, on which the step was chosen too",
        "Data": job.report.get("data_digest"),
        "Finished": datetime.fromtimestamp(job.finished_at or 0, UTC).isoformat(),
    }
    return render(
        Report(
            title=f"{job.fine_tuned_model}: evaluation",
            facts={name: found for name, found in facts.items() if found},
            evaluation=evaluation,
            lineage=job.report,
            gate=job.result.get("gate"),
        )
    )
