"""The page of a finished job: what was measured, for those who may see the job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import StorageFull
from tests.access_harness import KeyedHarness
from tests.api_harness import Harness
from tests.jobs_harness import Jobs, fast_jobs, jsonl
from tests.test_html_report import Page

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    fast_jobs(monkeypatch)
    harness = Harness.create(tmp_path / "prompts")
    with harness.client() as client:
        yield Jobs(harness, client)


def test_a_finished_job_has_a_page(jobs: Jobs) -> None:
    rows = [{"input": f"row {i}", "target": "positive" if i % 2 else HOSTILE} for i in range(40)]
    job = jobs.until(jobs.create(jobs.upload(jsonl(rows)), script="step step"), "succeeded")
    reply = jobs.client.get(f"/v1/fine_tuning/jobs/{job['id']}/report")
    assert reply.status_code == 200 and reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';") and "sandbox" in policy and "script-src" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    page = Page(reply.text)
    assert HOSTILE in page.text and HOSTILE not in reply.text
    for told in (
        "mood:1",
        job["id"],
        "10 of validation",
        "Accuracy",
        "Confusion",
        "Reliability",
        "The alias latest was",
    ):
        assert told in page.text, told
    assert f"{job['metrics']['soft_prompt']['accuracy']:.4f} [" in page.text
    assert '<th class="number" scope="col">mood:1</th>' in reply.text, "by the version's name"
    assert "Wrong answers" not in page.text and "row 1" not in page.text, "rows are not kept"
    [path] = jobs.folder(job).glob("evaluation.json")
    for damage in (b"{", b"[]", b'{"name": 1}'):
        path.write_bytes(damage)
        page = Page(jobs.client.get(f"/v1/fine_tuning/jobs/{job['id']}/report").text)
        assert "Accuracy" in page.text and "Confusion" not in page.text, "what the job itself has"


def test_the_curve_is_drawn_and_goes_with_the_version(jobs: Jobs) -> None:
    job = jobs.until(jobs.create(script="step"), "succeeded")
    assert jobs.harness.registry.version("mood", 1).manifest.lineage["curve"] == []
    record = jobs.folder(job) / "job.json"
    point = b'"curve": [{"step": 25, "train_loss": 2.0, "validation_loss": 1.5}]'
    record.write_bytes(record.read_bytes().replace(b'"curve": []', point))
    page = Page(jobs.client.get(f"/v1/fine_tuning/jobs/{job['id']}/report").text)
    assert "Loss" in page.text and "polyline" in page.tags


def test_a_job_whose_start_was_kept_says_so(jobs: Jobs) -> None:
    job = jobs.until(jobs.create(script="step"), "succeeded")
    record = jobs.folder(job) / "job.json"
    written = json.loads(record.read_bytes())
    points = [{"step": 0, "validation_loss": 1.5}, {"step": 25, "train_loss": 2.0, "validation_loss": 1.75}]
    written["report"] |= {"curve": points, "best_step": 0, "best_validation_loss": 1.5}
    record.write_text(json.dumps(written))
    [found] = jobs.client.get(f"/v1/fine_tuning/jobs/{job['id']}/checkpoints").json()["data"]
    assert found["step_number"] == 0 and found["metrics"] == {"step": 0, "valid_loss": 1.5}
    page = Page(jobs.client.get(f"/v1/fine_tuning/jobs/{job['id']}/report").text)
    assert "the step that was kept: 0" in page.text


def test_there_is_none_before_the_job_has_succeeded(jobs: Jobs) -> None:
    job = jobs.create(script="step hold")
    jobs.until(job, "running")
    reply = jobs.client.get(f"/v1/fine_tuning/jobs/{job['id']}/report")
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "invalid_job_state"
    jobs.ask(job, "cancel")
    reply = jobs.client.get(f"/v1/fine_tuning/jobs/{job['id']}/report")
    assert reply.status_code == 400 and "is cancelled" in reply.json()["error"]["message"]
    assert jobs.client.get("/v1/fine_tuning/jobs/ftjob-0/report").status_code == 404


def test_an_evaluation_that_cannot_be_kept_fails_no_job(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageFull("full")

    monkeypatch.setattr("app.jobs.store.JobStore.keep_evaluation", full)
    job = jobs.until(jobs.create(script="step"), "succeeded")
    page = Page(jobs.client.get(f"/v1/fine_tuning/jobs/{job['id']}/report").text)
    assert "Accuracy" in page.text and "Confusion" not in page.text


def test_it_is_there_for_those_who_see_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_jobs(monkeypatch)
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    harness.key("admin")
    with harness.client() as client:
        mine = Jobs(harness, client, harness.key("jobs", tenant="a"))
        job = mine.until(mine.create(script="step"), "succeeded")
        path = f"/v1/fine_tuning/jobs/{job['id']}/report"

        def status(headers: dict[str, str] | None) -> int:
            return client.get(path, headers=headers).status_code

        assert status(mine.headers) == status(harness.key("jobs", tenant="a")) == status(harness.key("admin")) == 200
        assert status(harness.key("jobs", tenant="b")) == 404 and status(None) == 401
        assert status(harness.key("generate", tenant="a")) == 403
        assert status(harness.key("jobs", tenant="a", tasks=["other*"])) == 404
