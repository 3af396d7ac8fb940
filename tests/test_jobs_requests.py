"""What clients may send to /v1/files and /v1/fine_tuning/jobs, and that the rest is refused with its name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from starlette.testclient import TestClient

from app.jobs.names import new_id
from app.train.recipe import DEFAULT_LEARNING_RATES, METHODS, Recipe
from tests.api_harness import Harness
from tests.jobs_harness import ROWS, Jobs, fast_jobs, jsonl

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    harness = Harness.create(tmp_path_factory.mktemp("requests") / "prompts", max_training_file_bytes=10_000)
    harness.publish("started", 0.25)
    return harness


@pytest.fixture(scope="module")
def client(harness: Harness) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        fast_jobs(patch)
        with harness.client() as client:
            yield client


@pytest.fixture
def jobs(harness: Harness, client: TestClient) -> Jobs:
    return Jobs(harness, client)


@pytest.fixture(scope="module")
def file(harness: Harness, client: TestClient) -> str:
    return Jobs(harness, client).upload()


def tuning(**members: Any) -> dict[str, Any]:
    return {"method": {"type": "prompt_tuning", "prompt_tuning": members}}


def hyper(**members: Any) -> dict[str, Any]:
    return tuning(hyperparameters=members)


BAD: list[tuple[dict[str, Any], str, int]] = [
    ({"model": ""}, "model", 400),
    ({"model": 3}, "model", 400),
    ({"training_file": None}, "training_file", 400),
    ({"training_file": ""}, "training_file", 400),
    ({"validation_file": 7}, "validation_file", 400),
    ({"suffix": "Not A Name"}, "suffix", 400),
    ({"suffix": "../../etc"}, "suffix", 400),
    ({"suffix": ""}, "suffix", 400),
    ({"suffix": "x" * 65}, "suffix", 400),
    ({"suffix": "tiny-llama"}, "suffix", 400),
    ({"suffix": ".softprompt"}, "suffix", 400),
    ({"seed": -1}, "seed", 400),
    ({"seed": 2**31}, "seed", 400),
    ({"seed": 1.5}, "seed", 400),
    ({"metadata": {"k": 1}}, "metadata", 400),
    ({"metadata": {"k" * 65: "v"}}, "metadata", 400),
    ({"metadata": {"k": "v" * 513}}, "metadata", 400),
    ({"metadata": {str(n): "v" for n in range(17)}}, "metadata", 400),
    ({"integrations": [{"type": "wandb"}]}, "integrations", 400),
    ({"shell": "rm"}, "shell", 400),
    ({"hyperparameters": {"batch_size": 0}}, "hyperparameters", 400),
    ({"hyperparameters": {"n_epochs": 10**9}}, "hyperparameters", 400),
    ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters", 400),
    ({"hyperparameters": {"learning_rate_multiplier": 1e9}}, "hyperparameters", 400),
    ({"hyperparameters": {"batch_size": "many"}}, "hyperparameters", 400),
    ({"method": {"type": "dpo", "dpo": {}}}, "method", 400),
    ({"method": {"type": "prefix"}}, "method", 400),
    ({"method": {"type": "prefix_tuning", "prompt_tuning": {}}}, "method", 400),
    ({"method": {"type": "cpt", "cpt": {"init": "labels"}}}, "init", 422),
    ({"method": {"type": "p_tuning", "p_tuning": {"residual": True}}}, "residual", 422),
    ({"method": {"type": "p_tuning", "p_tuning": {"hyperparameters": {"encoder": "gru"}}}}, "method", 400),
    (
        {"method": {"type": "cartridge", "cartridge": {"hyperparameters": {"num_virtual_tokens": 1}}}},
        "num_frozen_tokens",
        422,
    ),
    (tuning(init="words"), "method", 400),
    (tuning(init="text"), "init_text", 422),
    (tuning(init="labels", init_text="hi"), "init_text", 422),
    (tuning(init="prompt"), "init", 400),
    (tuning(for_task="a"), "for_task", 400),
    (hyper(learning_rate=0.1, learning_rate_multiplier=2), "learning_rate_multiplier", 400),
    (hyper(learning_rate="fast"), "method", 400),
    (hyper(budget_seconds=0), "method", 400),
    ({"method": {}}, "method", 400),
    ({"method": "prompt_tuning"}, "method", 400),
    (hyper(num_virtual_tokens=10**6), "method", 400),
    (hyper(max_steps=10**9), "method", 400),
    (hyper(unknown=1), "method", 400),
    (tuning(template="no place"), "template", 400),
    (tuning(template="x" * 10_001), "method", 400),
    (tuning(alias="../up"), "alias", 400),
    (tuning(alias="7"), "alias", 400),
    (tuning(stop=[""]), "method", 400),
    (tuning(classify="yes"), "method", 400),
    (tuning(gate=1), "method", 400),
]


@pytest.mark.parametrize(("change", "param", "status"), BAD, ids=[json.dumps(change)[:60] for change, *_ in BAD])
def test_a_bad_field_is_named(client: TestClient, file: str, change: dict[str, Any], param: str, status: int) -> None:
    reply = client.post(JOBS, json={"model": "tiny-llama", "training_file": file, "suffix": "mood"} | change)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), reply.text
    assert len(reply.content) < 2_000
    if "type" in change.get("method", ()) and change["method"]["type"] not in METHODS:
        assert "prompt_tuning" in error["message"], "what is supported is named"


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"model": NaN}', b'{"model": "a", "model": "b"}', b'{"seed": 1e999}']
)
def test_bodies_that_are_no_object(client: TestClient, body: bytes) -> None:
    assert client.post(JOBS, content=body, headers={"Content-Type": "application/json"}).status_code == 400


def test_unknown_names(client: TestClient, file: str) -> None:
    body = {"model": "tiny-llama", "training_file": file, "suffix": "mood"}
    for change in (
        {"training_file": new_id("file")},
        {"training_file": "../../etc/passwd"},
        {"validation_file": new_id("ftjob")},
        {"model": "unknown"},
        {"model": "started:9"},
        {"model": "/etc"},
    ):
        assert client.post(JOBS, json=body | change).status_code == 404, change
    for bad in ("x", new_id("ftjob"), new_id("file"), "..%2f..", "%00"):
        for method, end in (("GET", ""), ("GET", "/events"), ("GET", "/checkpoints"), ("POST", "/cancel")):
            assert client.request(method, f"{JOBS}/{bad}{end}").status_code == 404, (bad, end)
        for method, end in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert client.request(method, f"/v1/files/{bad}{end}").status_code == 404, (bad, end)


def test_uploads(client: TestClient) -> None:
    def send(file: Any = b"{}", purpose: str = "fine-tune", **more: Any) -> Any:
        return client.post("/v1/files", files={"file": file}, data={"purpose": purpose, **more})

    assert send(purpose="assistants").json()["error"]["param"] == "purpose"
    assert send(("x.jsonl", b"")).json()["error"]["param"] == "file"
    assert send(b"x" * 10_001).status_code == 413 and send(b"x" * 40_000).status_code == 413
    assert send(**{"expires_after[seconds]": "9"}).status_code == 400
    assert client.post("/v1/files", json={}).status_code == 415
    assert client.post("/v1/files", files={"file": b"{}"}).json()["error"]["param"] == "purpose"
    for name in ("../../../etc/passwd", "a\nb", "<script>", "x" * 1_000, "né.jsonl", "a;b"):
        reply = send((name, b"{}"))
        assert reply.status_code == 200, (name, reply.text)
        found = reply.json()
        assert len(found["filename"]) <= 255 and found["filename"].isprintable()
        content = client.get(f"/v1/files/{found['id']}/content")
        assert content.content == b"{}" and content.headers["content-type"] == "application/octet-stream"
        assert content.headers["content-disposition"] == f'attachment; filename="{found["id"]}.jsonl"'
        assert client.delete(f"/v1/files/{found['id']}").json() == {
            "id": found["id"],
            "object": "file",
            "deleted": True,
        }
        assert client.get(f"/v1/files/{found['id']}").status_code == 404


def test_lists_are_paged(jobs: Jobs, client: TestClient, file: str) -> None:
    made = [jobs.upload(), jobs.upload(), file]
    listed = [item["id"] for item in client.get("/v1/files").json()["data"]]
    assert listed == sorted(listed, reverse=True) and set(made) <= set(listed)
    first = client.get("/v1/files?limit=1").json()
    assert first["has_more"] and [item["id"] for item in first["data"]] == listed[:1]
    rest = client.get(f"/v1/files?after={listed[0]}").json()
    assert [item["id"] for item in rest["data"]] == listed[1:] and not rest["has_more"]
    assert [item["id"] for item in client.get("/v1/files?order=asc").json()["data"]] == listed[::-1]
    assert client.get("/v1/files?purpose=batch").json()["data"] == []
    job = jobs.until(jobs.create(file, metadata={"team": "x"}), "succeeded")
    events = jobs.events(job)[::-1]
    page = client.get(f"{JOBS}/{job['id']}/events?limit=2").json()
    assert page["has_more"] and page["data"] == events[:2]
    assert client.get(f"{JOBS}/{job['id']}/events?after={events[1]['id']}&limit=1000").json()["data"] == events[2:]
    assert [item["id"] for item in client.get(f"{JOBS}?metadata[team]=x").json()["data"]] == [job["id"]]
    assert client.get(f"{JOBS}?metadata[team]=y").json()["data"] == []
    for path in ("/v1/files", JOBS):
        assert client.get(f"{path}?limit=0").status_code == client.get(f"{path}?limit=99999").status_code == 400


def test_a_job_may_start_from_a_prompt(harness: Harness, jobs: Jobs) -> None:
    job = jobs.create(model="started", script="step hold")
    assert job["model"] == "started:1"
    jobs.until(job, "running")
    initial = load_file(jobs.folder(job) / "initial.safetensors")["prompt"]
    assert torch.equal(initial, torch.full((4, 32), 0.25))
    assert jobs.record(job).options.recipe["num_virtual_tokens"] == 4
    jobs.ask(job, "cancel")
    file = jobs.upload()
    for members in ({"hyperparameters": {"num_virtual_tokens": 5}}, {"init_text": "hi"}, {"init": "labels"}):
        reply = jobs.client.post(JOBS, json={"model": "started", "training_file": file, **tuning(**members)})
        assert reply.status_code == 400 and reply.json()["error"]["param"] in (
            "num_virtual_tokens",
            "init_text",
            "init",
        )
    job = jobs.create(model="started", script="hold", method={"type": "prefix_tuning"})
    assert jobs.record(job).options.recipe.items() >= {"method": "prefix_tuning", "init": "prompt"}.items()
    jobs.ask(job, "cancel")
    assert harness.num_pins == 0


def test_what_openai_s_clients_send(jobs: Jobs, file: str) -> None:
    given = {"batch_size": 8, "learning_rate_multiplier": 2, "n_epochs": "auto"}
    for method in ({"type": "supervised", "supervised": {"hyperparameters": given}}, None):
        body: dict[str, Any] = {"method": method} if method else {"hyperparameters": given, "method": None}
        job = jobs.create(file, **body)
        assert job["hyperparameters"] == {"batch_size": 8, "learning_rate_multiplier": 2.0, "n_epochs": "auto"}
        assert job["method"]["type"] == "prompt_tuning"
        recipe = jobs.record(job).options.recipe
        assert recipe["batch_size"] == 8 and recipe["learning_rate"] == pytest.approx(0.4)
        jobs.until(job, "succeeded")


def test_every_method_can_be_chosen(jobs: Jobs, file: str) -> None:
    given: dict[str, Any] = {
        "hyperparameters": {
            "learning_rate": "auto",
            "budget_seconds": 60,
            "encoder": "lstm",
            "num_ranks": 2,
            "precision": "float32",
        },
        "init_text": "hi",
        "description": "hold",
    }
    for method in METHODS:
        job = jobs.create(file, method={"type": method, method: given})
        assert job["method"]["type"] == method and job["method"][method]["init_text"] == "hi"
        assert job["method"][method]["hyperparameters"].items() >= given["hyperparameters"].items()
        recipe = Recipe(**jobs.record(job).options.recipe)
        assert (recipe.method, recipe.learning_rate, recipe.start) == (method, "auto", "text")
        assert (recipe.budget_seconds, recipe.max_steps, recipe.encoder, recipe.num_ranks) == (60, 100_000, "lstm", 2)
        assert recipe.precision == "float32"
        jobs.ask(job, "cancel")
    job = jobs.create(
        file, method={"type": "cartridge", "cartridge": {"hyperparameters": {"learning_rate_multiplier": 2}}}
    )
    assert jobs.record(job).options.recipe["learning_rate"] == 2 * DEFAULT_LEARNING_RATES["cartridge"]
    jobs.ask(job, "cancel")


def test_a_deleted_file_takes_nothing_from_a_job(jobs: Jobs, client: TestClient) -> None:
    file = jobs.upload(jsonl(ROWS))
    job = jobs.create(file, script="step once:hold step")
    assert client.delete(f"/v1/files/{file}").status_code == 200
    jobs.holds(job, 1)
    jobs.ask(job, "pause")
    jobs.ask(job, "resume")
    assert jobs.until(job, "succeeded", "failed")["status"] == "succeeded"


def test_the_queue_is_bounded_and_may_be_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_jobs(monkeypatch)
    harness = Harness.create(tmp_path / "prompts", max_training_queue=1)
    with harness.client() as client:
        jobs = Jobs(harness, client)
        file = jobs.upload()
        job = jobs.create(file, script="step hold")
        body = {"model": "tiny-llama", "training_file": file}
        reply = client.post(JOBS, json=body)
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "overloaded"
        jobs.ask(job, "cancel")
        assert client.post(JOBS, json=body).json()["task"].startswith("ft-")
    with Harness.create(tmp_path / "prompts", max_training_jobs=0).client() as client:
        assert client.post(JOBS, json=body).status_code == 503


def test_without_jobs_nothing_is_made(tmp_path: Path) -> None:
    harness = Harness.create(tmp_path / "prompts")
    with harness.client() as client:
        assert client.get(JOBS).json()["data"] == client.get("/v1/files").json()["data"] == []
    assert not harness.settings.training_folder.exists()
