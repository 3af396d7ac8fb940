"""Jobs outlive servers, and two servers on one folder share the queue without ever running a job twice."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.jobs import JobStore
from app.jobs.lease import Lease
from app.registry.durable import FileSystem
from tests.api_harness import Harness, wait_until
from tests.jobs_harness import WORKER, Jobs, fast_jobs


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    fast_jobs(monkeypatch)


def test_a_lease_is_shared_with_a_child_and_free_without_both(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    lease = Lease.take(path)
    assert lease is not None and Lease.take(path) is None
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lease.fileno()])
    lease.release()
    lease.release()
    assert Lease.take(path) is None, "the child has it still"
    child.communicate()
    again = Lease.take(path)
    assert again is not None
    again.release()


def test_a_server_that_ends_lets_its_job_go_on_in_the_next(tmp_path: Path) -> None:
    harness = Harness.create(tmp_path / "prompts")
    with harness.client() as client:
        jobs = Jobs(harness, client)
        job = jobs.create(script="note step step once:hold step")
        jobs.holds(job, 2)
    record = jobs.record(job)
    assert record.status == "queued" and record.crashes == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((jobs.folder(job) / "pids").read_text()), 0)
    harness = Harness.create(tmp_path / "prompts")
    with harness.client() as client:
        found = Jobs(harness, client).until(job, "succeeded", "failed")
    assert found["status"] == "succeeded" and found["step"] == 5, "it began with the two steps that were saved"


def test_a_killed_server_s_worker_keeps_the_job_until_it_is_gone(tmp_path: Path) -> None:
    """What the kernel does when a server is killed: its descriptors are closed, and its workers' input ends."""
    harness = Harness.create(tmp_path / "prompts")
    with harness.client() as client:
        jobs = Jobs(harness, client)
        job = jobs.create(script="step once:hold step")
        jobs.holds(job, 1)
    store: JobStore = harness.app.state.jobs
    store.change(job["id"], lambda found: replace(found, status="running"))
    lease = store.lease(job["id"])
    assert lease is not None
    orphan = subprocess.Popen(
        [sys.executable, "-I", "-S", str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=[lease.fileno()],
    )
    lease.release()
    harness = Harness.create(tmp_path / "prompts")
    with harness.client() as client:
        jobs = Jobs(harness, client)
        other = jobs.create(task="other")
        assert jobs.until(other, "succeeded", "failed")["status"] == "succeeded"
        assert jobs.get(job)["status"] == "running" and jobs.get(job)["step"] == 1
        orphan.communicate()
        assert jobs.until(job, "succeeded", "failed")["step"] == 3


def test_two_servers_share_one_queue(tmp_path: Path) -> None:
    with ExitStack() as stack:
        both = [Harness.create(tmp_path / "prompts") for _ in range(2)]
        jobs = [Jobs(harness, stack.enter_context(harness.client())) for harness in both]
        file = jobs[0].upload()
        made = [jobs[n % 2].create(file, script="note check-note alone step", task=f"t{n}") for n in range(6)]
        for n, job in enumerate(made):
            found = jobs[(n + 1) % 2].until(job, "succeeded", "failed")  # asked of the other one
            assert found["status"] == "succeeded", (found, jobs[0].log(job))
            assert len((jobs[0].folder(job) / "pids").read_text().split()) == 2, "one check and one training"
            assert jobs[0].record(job).crashes == 0, "never two at once"


def test_what_one_server_runs_another_cancels(tmp_path: Path) -> None:
    with ExitStack() as stack:
        both = [Harness.create(tmp_path / "prompts") for _ in range(2)]
        jobs = [Jobs(harness, stack.enter_context(harness.client())) for harness in both]
        job = jobs[0].create(script="step hold")
        jobs[1].wait(job, lambda found: found["step"] == 1)
        assert jobs[1].ask(job, "cancel").json()["status"] == "cancelled"
        wait_until(lambda: not (jobs[0].folder(job) / "work").exists())


def test_a_job_that_died_while_publishing_is_published_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness.create(tmp_path / "prompts")
    failures = iter([OSError(errno.EIO, "x")])
    move = harness.registry.move_alias

    def fail_once(*args: Any, **options: Any) -> Any:
        from app.errors import NotReady

        for error in failures:
            raise NotReady("the registry's storage failed") from error
        return move(*args, **options)

    monkeypatch.setattr(harness.registry, "move_alias", fail_once)
    with harness.client() as client:
        jobs = Jobs(harness, client)
        job = jobs.until(jobs.create(script="step"), "succeeded", "failed")
        assert job["fine_tuned_model"] == "mood:1" and list(harness.registry.task("mood").versions) == [1]
        assert harness.registry.resolve("mood").number == 1
        assert any("could not be published" in message for message in jobs.messages(job))


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is acknowledged that is not there; a job under way waits, and is not lost."""
    harness = Harness.create(tmp_path / "prompts")
    full = False
    write = FileSystem.write

    def refuse(self: FileSystem, file: int, data: memoryview) -> int:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, file, data)

    monkeypatch.setattr(FileSystem, "write", refuse)
    with harness.client() as client:
        jobs = Jobs(harness, client)
        file = jobs.upload()
        job = jobs.create(file, script="step once:hold step")
        jobs.holds(job, 1)
        full = True
        for reply in (
            client.post("/v1/files", files={"file": b"{}"}, data={"purpose": "fine-tune"}),
            client.post("/v1/fine_tuning/jobs", json={"model": "tiny-llama", "training_file": file}),
            jobs.ask(job, "pause"),
        ):
            assert reply.status_code == 507 and reply.json()["error"]["code"] == "storage_full"
            assert str(tmp_path) not in reply.text
        assert (
            len(client.get("/v1/files").json()["data"]) == len(client.get("/v1/fine_tuning/jobs").json()["data"]) == 1
        )
        root = harness.settings.training_folder
        assert not list(root.glob("*/.tmp-*")) and not list(root.glob("*/*/.tmp-*")), "nothing is left of it"
        full = False
        assert jobs.ask(job, "pause").status_code == 200
        jobs.ask(job, "resume")
        assert jobs.until(job, "succeeded", "failed")["step"] == 3


def test_how_a_job_ended_is_written_as_soon_as_the_disk_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness.create(tmp_path / "prompts")
    left = 5
    replace_file = FileSystem.rename

    def refuse(self: FileSystem, source: Path, target: Path) -> None:
        nonlocal left
        if target.name == "job.json" and b'"status": "failed"' in source.read_bytes() and left:
            left -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(self, source, target)

    monkeypatch.setattr(FileSystem, "rename", refuse)
    with harness.client() as client:
        jobs = Jobs(harness, client)
        job = jobs.until(jobs.create(script="note step fail"), "failed")
        assert job["error"]["code"] == "training_failed" and left == 0
        assert len((jobs.folder(job) / "pids").read_text().split()) == 1, "it was not done again for that"
        assert sum("The job failed" in message for message in jobs.messages(job)) == 1, "nor told again"


def test_damaged_records_cost_themselves_only(tmp_path: Path) -> None:
    harness = Harness.create(tmp_path / "prompts")
    with harness.client() as client:
        jobs = Jobs(harness, client)
        bad, good = jobs.create(script="step hold", task="bad"), jobs.create(task="good")
        jobs.until(bad, "running")
        jobs.ask(bad, "pause")
        whole = (jobs.folder(bad) / "job.json").read_bytes()
        (jobs.folder(bad) / "job.json").write_bytes(b'{"id": 7}')
        assert jobs.until(good, "succeeded", "failed")["status"] == "succeeded"
        reply = client.get(f"/v1/fine_tuning/jobs/{bad['id']}")
        assert reply.status_code == 503 and "damaged" in reply.json()["detail"]
        assert [job["id"] for job in client.get("/v1/fine_tuning/jobs").json()["data"]] == [good["id"]]
        (jobs.folder(bad) / "job.json").write_bytes(whole)
        jobs.ask(bad, "resume")
        jobs.until(bad, "running")  # whoever puts it right has it go on
        jobs.ask(bad, "cancel")


def test_a_line_that_was_cut_off_is_no_event(tmp_path: Path) -> None:
    harness = Harness.create(tmp_path / "prompts")
    with harness.client() as client:
        jobs = Jobs(harness, client)
        job = jobs.until(jobs.create(), "succeeded")
        before = jobs.messages(job)
        path = jobs.folder(job) / "events.jsonl"
        with path.open("ab") as file:
            file.write(b'{"id": "ftev')
        assert jobs.messages(job) == before
        harness.app.state.jobs.tell(job["id"], "info", "next")
        assert jobs.messages(job) == [*before, "next"]


def test_old_jobs_and_leftovers_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.store.MAX_FINISHED", 1)
    harness = Harness.create(tmp_path / "prompts")
    with harness.client() as client:
        jobs = Jobs(harness, client)
        made = [jobs.until(jobs.create(task=f"t{n}"), "succeeded") for n in range(3)]
        wait_until(lambda: not (jobs.folder(made[-1]) / "work").exists())
        kept = {path.name for path in jobs.folder(made[-1]).iterdir()}
        assert kept == {"job.json", "events.jsonl", "evaluation.json", "lock", "lease"}, (
            "the data of a finished job goes"
        )
        draft = harness.settings.training_folder / "jobs" / ".tmp-0"
        draft.mkdir()
        os.utime(draft, (1, 1))
        harness.app.state.jobs.sweep()
        assert [job["id"] for job in client.get("/v1/fine_tuning/jobs").json()["data"]] == [made[-1]["id"]]
        assert draft.exists(), "its inode is new: somebody may be writing it"
