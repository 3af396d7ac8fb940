"""The openai package as it is, from a file to a soft prompt that answers: real workers, trainer and engine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from app.config import Settings
from app.engine.local import LocalEngine
from app.main import create_app
from app.registry import Registry, Store
from tests.api_harness import Harness, wait_until
from tests.jobs_harness import jsonl
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
    "prompt_tuning": {"hyperparameters": {"max_steps": 200, "num_virtual_tokens": 5, "eval_every": 50, "patience": 9}},
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


def finished(client: OpenAI, job_id: str) -> Any:
    done = ("succeeded", "failed", "cancelled")
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status in done, 200)
    return client.fine_tuning.jobs.retrieve(job_id)


@pytest.mark.slow
def test_from_a_file_to_an_answer_through_a_kill(harness: Harness, client: OpenAI) -> None:
    file = client.files.create(file=("rows.jsonl", jsonl(ROWS)), purpose="fine-tune")
    assert (file.purpose, file.filename, file.bytes) == ("fine-tune", "rows.jsonl", len(jsonl(ROWS)))
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.content(file.id).read() == jsonl(ROWS)
    found = []
    for task in ("killed", "undisturbed"):
        job = client.fine_tuning.jobs.create(
            model="tiny-llama", training_file=file.id, suffix=task, seed=7, method=METHOD, metadata={"a": "b"}
        )
        folder = harness.settings.training_folder / "jobs" / job.id
        if task == "killed":
            state = folder / "work/out/checkpoint/state.safetensors"
            wait_until(lambda: state.exists(), 200)  # noqa: B023
            time.sleep(0.2)
            [worker] = pids(folder / "lease")
            os.kill(worker, signal.SIGKILL)
        job = finished(client, job.id)
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=3)]
        assert job.status == "succeeded", messages
        assert messages[0] == "The job has successfully completed"
        found.append(job)
    killed, undisturbed = (job.to_dict() for job in found)
    events = list(client.fine_tuning.jobs.list_events(found[0].id, limit=2))  # of several pages
    assert any("started again: the worker ended with status -9" in event.message for event in events)
    assert sum(event.type == "metrics" for event in events) >= 4
    assert killed["metrics"] == undisturbed["metrics"] and killed["trained_tokens"] == undisturbed["trained_tokens"]
    versions = [harness.registry.resolve(job.fine_tuned_model) for job in found]
    assert versions[0].files["adapter_model.safetensors"] == versions[1].files["adapter_model.safetensors"]
    assert versions[0].manifest.lineage["best_validation_loss"] == versions[1].manifest.lineage["best_validation_loss"]
    [checkpoint] = client.fine_tuning.jobs.checkpoints.list(found[0].id)
    assert checkpoint.fine_tuned_model_checkpoint == found[0].fine_tuned_model == "killed:1"
    reply = client.completions.create(model="killed", prompt="the red wall 3:", max_tokens=8, temperature=0)
    assert reply.choices[0].text
    assert {job.id for job in client.fine_tuning.jobs.list(limit=1)} == {job.id for job in found}
    assert client.files.delete(file.id).deleted and file.id not in [item.id for item in client.files.list()]
