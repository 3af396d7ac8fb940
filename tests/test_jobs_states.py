"""Training jobs from one state to the next, over HTTP, with a worker that does as it is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.errors import EngineFailed, NotReady, Overloaded
from app.jobs.job import Job
from app.jobs.lease import Lease
from app.jobs.publisher import Publisher
from app.registry.durable import FileSystem
from app.soft_prompt import SoftPrompt
from tests.api_harness import Harness, wait_until
from tests.jobs_harness import Jobs, fast_jobs


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    fast_jobs(monkeypatch)
    harness = Harness.create(tmp_path / "prompts")
    with harness.client() as client:
        yield Jobs(harness, client)


def gone(pid: int) -> None:
    """A zombie's /proc has no executable."""
    wait_until(lambda: not Path(f"/proc/{pid}/exe").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z")


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
    assert version["lineage"]["precision"] == "bfloat16" and version["lineage"]["trials"][0]["learning_rate"] == 0.3
    assert "tasks" not in version["lineage"]
    assert version["metrics"] == job["metrics"] and version["metrics"]["rows"] == 10
    engine = jobs.harness.engine
    assert len(engine.loaded) == 1 and engine.unloaded == engine.loaded, "tried on the base model, and forgotten"
    told = jobs.messages(job)
    assert told[0] == "Created fine-tuning job" and told[-1] == "The job has successfully completed"
    assert "a warning" in told and "New fine-tuned model created: mood:1" in told


@pytest.mark.parametrize(
    ("script", "status", "last"),
    [("step", "succeeded", "The job has successfully completed"), ("fail", "failed", "the loss is not finite")],
)
def test_who_sees_how_it_ended_finds_why(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, script: str, status: str, last: str
) -> None:
    rename, told = FileSystem.rename, []

    def look(self: FileSystem, source: Path, target: Path) -> None:
        if target.name == "job.json" and json.loads(source.read_bytes())["status"] == status:
            told.append((target.parent / "events.jsonl").read_text().splitlines()[-1])
        rename(self, source, target)

    monkeypatch.setattr(FileSystem, "rename", look)
    jobs.until(jobs.create(script=script), "succeeded", "failed")
    assert [last in line for line in told] == [True]


def test_bad_data_fails_it_and_nothing_is_published(jobs: Jobs) -> None:
    job = jobs.until(jobs.create(script="check-refuse"), "failed", "succeeded")
    assert job["error"] == {
        "code": "invalid_training_file",
        "message": "1 bad row: line 3: not JSON",
        "param": "training_file",
    }
    assert job["data"]["problem_counts"] == {"not_json": 1} and job["data"]["problems"][0]["line"] == 3
    assert "training_file, line 3: not JSON" in jobs.messages(job)
    assert job["fine_tuned_model"] is None and jobs.harness.registry.tasks() == []


@pytest.mark.parametrize(
    ("script", "code"),
    [("step fail", "training_failed"), ("crash", "training_crashed"), ("check-crash", "training_crashed")],
)
def test_it_fails(jobs: Jobs, script: str, code: str) -> None:
    job = jobs.until(jobs.create(script=f"note check-note {script}"), "failed", "succeeded")
    assert job["error"]["code"] == code and job["fine_tuned_model"] is None
    pids = (jobs.folder(job) / "pids").read_text().split()
    checks = 3 if "check-crash" in script else 1
    assert len(pids) == checks + (0 if checks == 3 else 3 if code == "training_crashed" else 1)
    assert jobs.harness.registry.tasks() == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_worker_may_have_little_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_jobs(monkeypatch)
    settings: dict[str, Any] = {"training_nice": 12, "training_memory_bytes": 2**31}
    harness = Harness.create(tmp_path / "prompts", **settings)
    with harness.client() as client:
        jobs = Jobs(harness, client)
        failed = jobs.until(jobs.create(script="bounds"), "failed")
    assert failed["error"]["message"] == f"12 1000 {2**31} 0"


def test_a_crash_is_survived_with_what_was_done(jobs: Jobs) -> None:
    job = jobs.until(jobs.create(script="step step once:crash step"), "succeeded", "failed")
    assert job["status"] == "succeeded" and job["step"] == 5, "two steps were kept, and three came on top"
    assert any("started again: the worker ended with status -9" in message for message in jobs.messages(job))


def test_crashes_with_progress_between_them_are_not_counted_together(jobs: Jobs) -> None:
    job = jobs.create(script="step crash")
    found = jobs.wait(job, lambda found: found["step"] >= 6)
    assert found["status"] in ("running", "queued"), "each time it got a step further"
    assert jobs.ask(job, "cancel").status_code == 200


def test_silence_is_taken_for_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_jobs(monkeypatch)
    harness = Harness.create(tmp_path / "prompts", training_silence=0.3)
    with harness.client() as client:
        jobs = Jobs(harness, client)
        job = jobs.until(jobs.create(script="step once:silent step"), "succeeded", "failed")
        assert job["step"] == 3 and any("silent for too long" in message for message in jobs.messages(job))


def test_too_long_a_job_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_jobs(monkeypatch)
    harness = Harness.create(tmp_path / "prompts", training_timeout=0.3)
    with harness.client() as client:
        jobs = Jobs(harness, client)
        job = jobs.until(jobs.create(script="step hold"), "succeeded", "failed")
        assert job["error"]["code"] == "timeout"


@pytest.mark.parametrize("state", ["running", "paused"])
@pytest.mark.parametrize("worker", ["", "deaf"])
def test_cancel(jobs: Jobs, monkeypatch: pytest.MonkeyPatch, state: str, worker: str) -> None:
    monkeypatch.setattr("app.jobs.run.GRACE", 0.2)
    job = jobs.create(script=f"note step {worker} hold")
    jobs.wait(job, lambda found: found["step"] == 1)
    if state == "paused":
        assert jobs.ask(job, "pause").json()["status"] == "paused"
    reply = jobs.ask(job, "cancel")
    assert reply.status_code == 200 and reply.json()["status"] == "cancelled" and reply.json()["finished_at"]
    gone(int((jobs.folder(job) / "pids").read_text()))
    wait_until(lambda: not (jobs.folder(job) / "work").exists())
    assert jobs.get(job)["status"] == "cancelled" and jobs.harness.registry.tasks() == []
    again = jobs.ask(job, "cancel")
    assert again.status_code == 400 and again.json()["error"]["code"] == "invalid_job_state"


def test_a_cancelled_job_is_never_published_even_if_nobody_looks(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs.create(script="note step nap " + "nap " * 30)
    jobs.wait(job, lambda found: found["step"] == 1)
    monkeypatch.setattr("app.jobs.run.POLL", 60.0)
    assert jobs.ask(job, "cancel").status_code == 200
    gone(int((jobs.folder(job) / "pids").read_text()))
    wait_until(lambda: not (jobs.folder(job) / "work").exists())
    assert jobs.get(job)["status"] == "cancelled" and jobs.harness.registry.tasks() == []


def test_pause_and_resume(jobs: Jobs) -> None:
    job = jobs.create(script="note step once:hold step")
    jobs.holds(job, 1)
    assert jobs.ask(job, "resume").status_code == 400
    assert jobs.ask(job, "pause").json()["status"] == "paused"
    assert jobs.ask(job, "pause").status_code == 400
    gone(int((jobs.folder(job) / "pids").read_text()))
    other = jobs.create(script="", task="other")
    assert jobs.until(other, "succeeded", "failed")["status"] == "succeeded", "a paused job keeps no place"
    assert jobs.get(job)["status"] == "paused"
    assert jobs.ask(job, "resume").json()["status"] == "queued"
    job = jobs.until(job, "succeeded", "failed")
    assert job["status"] == "succeeded" and job["step"] == 3


def test_one_at_a_time_the_oldest_first(jobs: Jobs) -> None:
    first = jobs.create(script="step hold", task="first")
    jobs.until(first, "running")
    second, third = (jobs.create(script="step", task=task) for task in ("second", "third"))
    for job in (second, third):
        jobs.until(job, "queued")
    assert jobs.harness.app.state.jobs.counts() == {"validating_files": 0, "queued": 2, "running": 1, "paused": 0}
    jobs.ask(first, "cancel")
    done = [jobs.until(job, "succeeded") for job in (second, third)]
    assert jobs.record(done[0]).started_at <= jobs.record(done[1]).started_at  # type: ignore[operator]
    assert jobs.ask(third, "pause").status_code == 400


def test_a_place_that_becomes_free_in_the_middle_of_a_look_goes_to_the_oldest(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, is_taken, refusals = jobs.harness.app.state.jobs, True, 0
    slot = store.slot

    def freed_after_one_look(kind: str, count: int) -> Lease | None:
        nonlocal refusals
        if kind == "train" and (is_taken or refusals == 0):
            refusals += not is_taken
            return None
        return slot(kind, count)

    monkeypatch.setattr(store, "slot", freed_after_one_look)
    second, third = (jobs.create(script="step", task=task) for task in ("second", "third"))
    for job in (second, third):
        jobs.until(job, "queued")
    is_taken = False
    jobs.until(third, "succeeded")
    assert refusals == 1 and jobs.get(second)["status"] == "succeeded"


def test_a_full_disk_pauses_it(jobs: Jobs) -> None:
    job = jobs.until(jobs.create(script="step once:full step"), "paused")
    assert any("storage of training jobs is full" in message for message in jobs.messages(job))
    jobs.ask(job, "resume")
    assert jobs.until(job, "succeeded", "failed")["step"] == 3


def test_an_error_that_nobody_foresaw_ends_a_job_and_not_the_queue(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = Publisher.publish

    async def broken(self: Publisher, job: Job, *args: Any, **kwargs: Any) -> Any:
        if job.task == "bad":
            raise KeyError("a bug")
        return await publish(self, job, *args, **kwargs)

    monkeypatch.setattr(Publisher, "publish", broken)
    bad, good = jobs.create(task="bad"), jobs.create(task="good")
    found = jobs.until(bad, "succeeded", "failed")
    assert found["error"]["code"] == "training_crashed" and "KeyError" in found["error"]["message"]
    assert "a bug" not in str(found), "what a bug says may quote anything"
    assert jobs.until(good, "succeeded", "failed")["status"] == "succeeded"


def test_a_busy_engine_is_waited_for(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.publisher.BUSY_SECONDS", 0.01)
    engine, asked = jobs.harness.engine, 0
    load = engine.load

    async def busy(prompt: SoftPrompt) -> None:
        nonlocal asked
        asked += 1
        if asked < 4:
            raise (Overloaded("x"), NotReady("x"), EngineFailed("x"))[asked - 1]
        await load(prompt)

    monkeypatch.setattr(engine, "load", busy)
    job = jobs.until(jobs.create(), "succeeded", "failed")
    assert job["status"] == "succeeded" and asked >= 4
    assert not any("started again" in message for message in jobs.messages(job))


def test_a_lease_that_cannot_be_had_costs_no_place(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    store, failures = jobs.harness.app.state.jobs, 0
    lease = store.lease

    def once_broken(job_id: str) -> Lease | None:
        nonlocal failures
        failures += 1
        if failures <= 2:
            raise NotReady("the disk")
        return lease(job_id)

    monkeypatch.setattr(store, "lease", once_broken)
    assert jobs.until(jobs.create(), "succeeded", "failed")["status"] == "succeeded" and failures > 2


def test_a_job_that_cannot_be_tidied_stops_no_other(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    store, failures = jobs.harness.app.state.jobs, 0
    first = jobs.create(script="step hold", task="first")
    jobs.until(first, "running")

    def broken(_: str) -> None:
        nonlocal failures
        failures += 1
        raise NotReady("the disk")

    monkeypatch.setattr(store, "tidy", broken)
    jobs.ask(first, "cancel")
    assert jobs.until(jobs.create(task="second"), "succeeded", "failed")["status"] == "succeeded" and failures
