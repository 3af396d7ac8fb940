"""Training jobs from one state to the next, over HTTP, with a worker that does as it is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api_harness import Harness
from tests.jobs_harness import Jobs, fast_jobs


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    fast_jobs(monkeypatch)
    harness = Harness.create(tmp_path / "prompts")
    with harness.client() as client:
        yield Jobs(harness, client)


def test_a_job_succeeds(jobs: Jobs) -> None:
    created = jobs.create(script="step chatter step", metadata={"for": "tests"}, seed=3)
    assert created["status"] == "validating_files" and created["object"] == "fine_tuning.job"
    job = jobs.until(created, "succeeded", "failed")
    assert job["status"] == "succeeded", jobs.messages(job)
    assert job["fine_tuned_model"] == "mood:1" and job["error"] is None and job["finished_at"] >= job["created_at"]
    assert (job["trained_tokens"], job["step"], job["max_steps"], job["seed"]) == (20, 2, 100, 3)
    assert job["metadata"] == {"for": "tests"} and job["estimated_finish"] is None
    assert job["gate"]["moved"] and job["gate"]["reason"] == "the alias is new"
    version = jobs.client.get("/v1/tasks/mood/versions/1").json()
    assert version["aliases"] == ["latest"] and version["labels"] == ["negative", "positive"]
    assert version["lineage"]["job"] == job["id"] and version["lineage"]["seed"] == 3
    assert version["metrics"] == job["metrics"] and version["metrics"]["rows"] == 10
    assert version["digest"] in jobs.harness.engine.loaded, "tried on the base model first"
    told = jobs.messages(job)
    assert told[0] == "Created fine-tuning job" and told[-1] == "The job has successfully completed"
    assert "a warning" in told and "New fine-tuned model created: mood:1" in told
