"""The openai package as it is, from a file to a soft prompt that answers: real workers, trainer and engine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from app.config import Settings
from app.engine.local import LocalEngine
from app.jobs import Job
from app.main import create_app
from app.registry import Registry, Store
from app.registry.log import sha256
from tests.api_harness import Harness, wait_until
from tests.jobs_harness import fast_jobs, jsonl
from tests.test_train_worker import prepared, run
from tests.tiny import tiny_base

# Enough steps to be killed between them.
COLOURS = {"red": " positive", "green": " negative", "blue": " negative", "white": " positive", "black": " negative"}
ROWS = [
    {"prompt": f"{article} {colour} wall {number}:", "completion": answer}
    for number in range(6)
    for article in ("the", "one")
    for colour, answer in COLOURS.items()
]
METHOD: Any = {
    "type": "prompt_tuning",
    "prompt_tuning": {"hyperparameters": {"max_steps": 100, "num_virtual_tokens": 5, "eval_every": 25, "patience": 9}},
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    base = tiny_base("llama")
    root = tmp_path_factory.mktemp("openai") / "prompts"
    engine: Any = LocalEngine(base.model, base.info, max_num_seqs=8, kv_cache_tokens=4096)
    engine.start()
    settings = Settings(registry=root, allowed_hosts=("*",), cache_dir=base.path.parent / "cache", training_nice=0)
    registry = Registry(Store(root), base.info)
    return Harness(settings, engine, registry, base, create_app(settings, engine, registry, base))


@pytest.fixture(scope="module")
def client(harness: Harness) -> Iterator[OpenAI]:
    with harness.listening() as server:
        with OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
            yield client


def pids(folder: Path) -> list[int]:
    """Of the processes that have a file of this folder open."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                names = [os.readlink(link) for link in (process / "fd").iterdir()]
            except OSError:
                continue
            if any(name.startswith(str(folder)) for name in names):
                found.append(int(process.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_a_file_to_an_answer_through_a_kill(harness: Harness, client: OpenAI, tmp_path: Path) -> None:
    file = client.files.create(file=("rows.jsonl", jsonl(ROWS)), purpose="fine-tune")
    assert (file.purpose, file.filename, file.bytes) == ("fine-tune", "rows.jsonl", len(jsonl(ROWS)))
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.content(file.id).read() == jsonl(ROWS)
    job = client.fine_tuning.jobs.create(
        model="tiny-llama", training_file=file.id, suffix="mood", seed=7, method=METHOD, metadata={"a": "b"}
    )
    folder = harness.settings.training_folder / "jobs" / job.id
    state = folder / "work/out/checkpoint/state.safetensors"
    wait_until(lambda: state.exists(), 200)
    options = vars(Job.from_json((folder / "job.json").read_bytes()).options)
    [worker] = pids(folder / "lease")
    os.kill(worker, signal.SIGKILL)
    done = ("succeeded", "failed", "cancelled")
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status in done, 200)
    job = client.fine_tuning.jobs.retrieve(job.id)
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))  # of several pages
    assert job.status == "succeeded", events
    assert events[0].message == "The job has successfully completed"
    assert any("started again: the worker ended with status -9" in event.message for event in events)
    assert sum(event.type == "metrics" for event in events) >= 4
    assert job.fine_tuned_model == "mood:1" and job.trained_tokens and job.metadata == {"a": "b"}
    run(prepared(tmp_path / "undisturbed", rows=ROWS, seed=7, options=options))
    undisturbed = (tmp_path / "undisturbed/work/out/adapter_model.safetensors").read_bytes()
    assert harness.registry.resolve("mood").files["adapter_model.safetensors"] == sha256(undisturbed)
    [checkpoint] = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == "mood:1" and checkpoint.metrics.valid_loss
    reply = client.completions.create(model="mood", prompt="the red wall 3:", max_tokens=8, temperature=0)
    assert reply.choices[0].text
    with pytest.raises(BadRequestError):
        client.fine_tuning.jobs.cancel(job.id)
    assert [item.id for item in client.fine_tuning.jobs.list(limit=1)] == [job.id]
    assert client.files.delete(file.id).deleted and file.id not in [item.id for item in client.files.list()]


def test_pause_resume_and_cancel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_jobs(monkeypatch)
    harness = Harness.create(tmp_path / "prompts")
    with harness.listening() as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            jobs = client.fine_tuning.jobs
            rows = [{"input": row["prompt"], "target": row["completion"]} for row in ROWS]
            file = client.files.create(file=("rows.jsonl", jsonl(rows)), purpose="fine-tune")
            method: Any = {"type": "prompt_tuning", "prompt_tuning": {"description": "step hold"}}
            job = jobs.create(model="tiny-llama", training_file=file.id, method=method)
            wait_until(lambda: jobs.retrieve(job.id).status == "running")
            assert jobs.pause(job.id).to_dict()["status"] == "paused"
            assert jobs.resume(job.id).status == "queued"
            wait_until(lambda: jobs.retrieve(job.id).status == "running")
            assert jobs.cancel(job.id).status == "cancelled"
            assert list(jobs.checkpoints.list(job.id)) == []
