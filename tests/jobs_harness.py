"""A server whose training jobs are worked on by a script without torch, which does what its job's metadata says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.jobs import Job
from tests.api_harness import Harness, files, wait_until

WORKER = Path(__file__).parent / "fake_worker.py"
ROWS = [{"input": f"row {number}", "target": "positive" if number % 2 else "negative"} for number in range(40)]


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def fast_jobs(monkeypatch: pytest.MonkeyPatch, *, poll: float = 0.02) -> None:
    """Short turns, and the script in place of the trainer."""
    for module in ("run", "supervisor"):
        monkeypatch.setattr(f"app.jobs.{module}.POLL", poll)
    monkeypatch.setattr("app.jobs.run.SAVE_EVERY", 0.0)
    monkeypatch.setattr("app.jobs.run.GRACE", 5.0)
    # -S and -I: it must start in some milliseconds.
    monkeypatch.setattr("app.jobs.run.COMMAND", (sys.executable, "-I", "-S", str(WORKER)))


@dataclass
class Jobs:
    """Requests about jobs."""

    harness: Harness
    client: TestClient
    headers: dict[str, str] | None = None

    def upload(self, data: bytes | None = None, name: str = "rows.jsonl", **headers: Any) -> str:
        reply = self.client.post(
            "/v1/files",
            files={"file": (name, jsonl(ROWS) if data is None else data)},
            data={"purpose": "fine-tune"},
            headers=self.headers,
        )
        assert reply.status_code == 200, reply.text
        found: str = reply.json()["id"]
        return found

    def create(self, file: str | None = None, *, script: str = "", task: str = "mood", **body: Any) -> dict[str, Any]:
        """`script` is what the worker does; see fake_worker.py."""
        given = {"model": "tiny-llama", "training_file": file or self.upload(), "suffix": task, **body}
        tuning = {"description": script, **body.pop("tuning", {})}
        given.pop("tuning", None)
        given.setdefault("method", {"type": "prompt_tuning", "prompt_tuning": tuning})
        reply = self.client.post("/v1/fine_tuning/jobs", json=given, headers=self.headers)
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    def get(self, job: dict[str, Any]) -> dict[str, Any]:
        reply = self.client.get(f"/v1/fine_tuning/jobs/{job['id']}", headers=self.headers)
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    def ask(self, job: dict[str, Any], what: str) -> Any:
        return self.client.post(f"/v1/fine_tuning/jobs/{job['id']}/{what}", headers=self.headers)

    def until(self, job: dict[str, Any], *statuses: str) -> dict[str, Any]:
        """The job once it has one of these."""
        return self.wait(job, lambda found: found["status"] in statuses)

    def holds(self, job: dict[str, Any], step: int) -> None:
        """Wait until its worker is at the `once:hold` behind that step: it says the step first, and then gets there."""
        mark = self.folder(job) / "work" / "did-hold"
        self.wait(job, lambda found: found["step"] == step and mark.exists())

    def wait(self, job: dict[str, Any], condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        last: list[dict[str, Any]] = []

        def holds() -> bool:
            last[:] = [self.get(job)]
            return condition(last[0])

        try:
            wait_until(holds, 20)
        except AssertionError:
            raise AssertionError(f"{last[0]} {self.messages(job)} {self.log(job)}") from None
        return last[0]

    def events(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        """The oldest first."""
        reply = self.client.get(f"/v1/fine_tuning/jobs/{job['id']}/events?limit=1000", headers=self.headers)
        found: list[dict[str, Any]] = reply.json()["data"]
        return found[::-1]

    def messages(self, job: dict[str, Any]) -> list[str]:
        return [event["message"] for event in self.events(job)]

    def folder(self, job: dict[str, Any]) -> Path:
        return self.harness.settings.training_folder / "jobs" / str(job["id"])

    def record(self, job: dict[str, Any]) -> Job:
        return Job.from_json((self.folder(job) / "job.json").read_bytes())

    def log(self, job: dict[str, Any]) -> str:
        path = self.folder(job) / "worker.log"
        return path.read_text() if path.exists() else ""


def checkpoint(folder: Path, content: float) -> None:
    """What a trainer leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    given = files(content)
    (folder / "adapter_config.json").write_bytes(given["adapter_config"])
    (folder / "adapter_model.safetensors").write_bytes(given["adapter_model"])
