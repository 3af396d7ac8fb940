"""Training files and jobs belong to a tenant, and a job may do at its end what its key may do then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.access_harness import KeyedHarness
from tests.jobs_harness import Jobs, fast_jobs


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeyedHarness:
    fast_jobs(monkeypatch)
    return KeyedHarness.keyed(tmp_path / "prompts")


@pytest.fixture
def client(harness: KeyedHarness) -> Iterator[TestClient]:
    harness.key("admin")  # from now on it is closed
    with harness.client() as client:
        yield client


def test_another_tenant_s_are_not_there(harness: KeyedHarness, client: TestClient) -> None:
    mine = Jobs(harness, client, harness.key("jobs", tenant="a"))
    mate = Jobs(harness, client, harness.key("jobs", tenant="a"))
    other = Jobs(harness, client, harness.key("jobs", tenant="b"))
    admin = Jobs(harness, client, harness.key("admin"))
    file = mine.upload()
    job = mine.create(file, script="step hold")
    mine.until(job, "running")
    for path in (
        *(f"/v1/files/{file}", f"/v1/files/{file}/content"),
        *(f"/v1/fine_tuning/jobs/{job['id']}{end}" for end in ("", "/events", "/checkpoints")),
    ):
        unknown = client.get(path.replace(file[-6:], "000000").replace(job["id"][-6:], "000000"), headers=other.headers)
        hidden = client.get(path, headers=other.headers)
        assert unknown.status_code == hidden.status_code == 404
        assert unknown.json()["error"] == hidden.json()["error"], "nothing tells them apart"
        for caller in (mine, mate, admin):
            assert client.get(path, headers=caller.headers).status_code == 200
    for what in ("cancel", "pause", "resume"):
        assert other.ask(job, what).status_code == 404
    assert client.delete(f"/v1/files/{file}", headers=other.headers).status_code == 404
    body = {"model": "tiny-llama", "training_file": file, "suffix": "x"}
    reply = client.post("/v1/fine_tuning/jobs", json=body, headers=other.headers)
    assert reply.status_code == 404, "nor can it be trained on"
    for path in ("/v1/files", "/v1/fine_tuning/jobs"):
        assert client.get(path, headers=other.headers).json()["data"] == []
        assert len(client.get(path, headers=mate.headers).json()["data"]) == 1
        assert len(client.get(path, headers=admin.headers).json()["data"]) == 1
    assert mate.ask(job, "cancel").status_code == 200


def test_task_patterns_hold_for_jobs(harness: KeyedHarness, client: TestClient) -> None:
    harness.publish("secret")
    keyed = Jobs(harness, client, harness.key("jobs", tasks=["support-*"], tenant="a"))
    file = keyed.upload()

    def create(**body: Any) -> Any:
        given = {"model": "tiny-llama", "training_file": file, **body}
        return client.post("/v1/fine_tuning/jobs", json=given, headers=keyed.headers)

    assert create(suffix="mood").status_code == 404
    assert create().status_code == 404, "a made-up name does not match either"
    assert create(suffix="support-a", model="secret").status_code == 404
    assert create(suffix="support-a", model="secret").json() | {"instance": ""} == create(
        suffix="support-a", model="nope"
    ).json() | {"instance": ""}
    job = keyed.until(create(suffix="support-a").json(), "succeeded", "failed")
    assert job["fine_tuned_model"] == "support-a:1"
    again = keyed.until(create(suffix="support-b", model="support-a").json(), "succeeded", "failed")
    assert again["model"] == "support-a:1"
    narrow = Jobs(harness, client, harness.key("jobs", tasks=["support-b"], tenant="a"))
    seen = [job["task"] for job in client.get("/v1/fine_tuning/jobs", headers=narrow.headers).json()["data"]]
    assert seen == ["support-b"], "of its tenant's jobs those whose tasks it has"


def test_another_alias_needs_its_scope(harness: KeyedHarness, client: TestClient) -> None:
    keyed = Jobs(harness, client, harness.key("jobs"))
    body = {
        "model": "tiny-llama",
        "training_file": keyed.upload(),
        "suffix": "mood",
        "method": {"type": "prompt_tuning", "prompt_tuning": {"alias": "prod"}},
    }
    assert client.post("/v1/fine_tuning/jobs", json=body, headers=keyed.headers).status_code == 403
    both = Jobs(harness, client, harness.key("jobs", "aliases:write"))
    job = both.until(both.create(tuning={"alias": "prod"}), "succeeded", "failed")
    assert job["gate"]["alias"] == "prod" and job["gate"]["moved"]
    assert list(harness.registry.task("mood").aliases) == ["prod"]


@pytest.mark.parametrize("when", ["running", "queued"])
def test_a_revoked_key_ends_its_jobs(harness: KeyedHarness, client: TestClient, when: str) -> None:
    headers = harness.key("jobs", tenant="a")
    keyed = Jobs(harness, client, headers)
    mate = Jobs(harness, client, harness.key("jobs", tenant="a"))
    if when == "queued":
        keeper = mate.create(script="step hold", task="keeper")
        mate.until(keeper, "running")
    job = keyed.create(script="step" if when == "queued" else "step hold")
    keyed.until(job, when)
    harness.store.revoke(harness.key_id(headers))
    harness.access.load()
    if when == "queued":
        mate.ask(keeper, "cancel")
    found = mate.until(job, "failed", "succeeded")
    assert found["error"]["code"] == "permission_denied" and "no longer valid" in found["error"]["message"]
    assert harness.registry.tasks() == []


def test_a_key_that_is_revoked_while_the_result_is_scored(
    harness: KeyedHarness, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = harness.key("jobs", tenant="a")
    keyed, mate = (Jobs(harness, client, key) for key in (headers, harness.key("jobs", tenant="a")))
    load = harness.engine.load

    async def revoke_first(prompt: Any) -> None:
        monkeypatch.setattr("app.jobs.run.POLL", 60.0)  # nobody looks before it is published
        harness.store.revoke(harness.key_id(headers))
        harness.access.load()
        await load(prompt)

    monkeypatch.setattr(harness.engine, "load", revoke_first)
    found = mate.until(keyed.create(script="step"), "failed", "succeeded")
    assert found["error"]["code"] == "permission_denied" and harness.registry.tasks() == []


def test_jobs_of_an_open_server_end_when_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_jobs(monkeypatch)
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    with harness.client() as client:
        open_jobs = Jobs(harness, client)
        job = open_jobs.create(script="step hold")
        open_jobs.until(job, "running")
        admin = Jobs(harness, client, harness.key("admin"))
        assert admin.until(job, "failed")["error"]["code"] == "permission_denied"
        assert Jobs(harness, client, harness.key("jobs")).ask(job, "cancel").status_code == 404


def test_changes_are_audited(harness: KeyedHarness, client: TestClient) -> None:
    headers = harness.key("jobs")
    keyed = Jobs(harness, client, headers)
    file = keyed.upload()
    job = keyed.until(keyed.create(file, script="step"), "succeeded")
    keyed.ask(job, "cancel")
    client.delete(f"/v1/files/{file}", headers=headers)
    entries = client.get("/v1/audit", headers=harness.key("admin")).json()["data"]
    told = [(entry["action"], entry["target"], entry["status"]) for entry in reversed(entries)]
    assert told == [
        ("create_file", file, 200),
        ("create_fine_tuning_job", f"{job['id']} mood", 200),
        ("publish_version", "mood:1", 201),
        ("cancel_fine_tuning_job", job["id"], 400),
        ("delete_file", file, 200),
    ]
    assert {entry["key_id"] for entry in entries} == {harness.key_id(headers)}
    assert [entry["request_id"] for entry in entries if entry["action"] == "publish_version"] == [job["id"]]
    [change] = [item for item in harness.registry.history("mood", before=None, limit=9) if item.seq == 1]
    assert change.actor == harness.key_id(headers)


def test_quotas(harness: KeyedHarness, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.files.MAX_FILES", 2)
    monkeypatch.setattr("app.jobs.store.MAX_OF_TENANT", 1)
    one, other = (Jobs(harness, client, harness.key("jobs", tenant=tenant)) for tenant in "ab")
    file = one.upload()
    one.upload()
    reply = client.post("/v1/files", files={"file": b"{}"}, data={"purpose": "fine-tune"}, headers=one.headers)
    assert reply.status_code == 429 and reply.headers["retry-after"]
    other.upload()
    job = one.create(file, script="step hold")
    body = {"model": "tiny-llama", "training_file": file, "suffix": "x"}
    reply = client.post("/v1/fine_tuning/jobs", json=body, headers=one.headers)
    assert reply.status_code == 429 and reply.headers["retry-after"]
    assert one.ask(job, "cancel").status_code == 200
    one.create(file, script="step", task="next")
