"""Tasks, versions and aliases over HTTP, with their preconditions; and the models list."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.errors import NotReady
from tests.api_harness import NUM_VIRTUAL_TOKENS, Harness, files


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness.create(tmp_path / "prompts")


@pytest.fixture
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


def ok(reply: Any, status: int = 200) -> Any:
    assert reply.status_code == status, reply.text
    return reply.json()


def code(reply: Any) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def test_empty(client: TestClient) -> None:
    assert ok(client.get("/v1/tasks")) == {"object": "list", "data": [], "has_more": False}


def test_tasks_are_paged_by_name(harness: Harness, client: TestClient) -> None:
    for name in ("c", "a", "b"):
        harness.publish(name)
    first = ok(client.get("/v1/tasks?limit=2"))
    assert [task["task"] for task in first["data"]] == ["a", "b"] and first["has_more"]
    rest = ok(client.get("/v1/tasks?limit=2&after=b"))
    assert [task["task"] for task in rest["data"]] == ["c"] and not rest["has_more"]
    assert not ok(client.get("/v1/tasks?limit=3"))["has_more"]


def test_versions_are_paged_by_number(harness: Harness, client: TestClient) -> None:
    for content in range(12):
        harness.publish("a", content / 10)
    page = ok(client.get("/v1/tasks/a/versions?limit=4&after=8"))
    assert [version["version"] for version in page["data"]] == [9, 10, 11, 12] and not page["has_more"]
    assert ok(client.get("/v1/tasks/a/versions?limit=4"))["has_more"]
    assert ok(client.get("/v1/tasks/a/versions?after=99")) == {"object": "list", "data": [], "has_more": False}
    # The last one of the page before may be deleted by the time the next one is asked for.
    ok(client.delete("/v1/tasks/a/versions/8"))
    assert ok(client.get("/v1/tasks/a/versions?limit=4&after=8")) == page
    for after in ("x", "-1", "1.5", "a:1", "", "9" * 30):
        assert code(client.get("/v1/tasks/a/versions", params={"after": after})) == (400, "invalid_request"), after
    assert code(client.get("/v1/tasks/nope/versions")) == (404, "not_found")


def test_tags(harness: Harness, client: TestClient) -> None:
    harness.publish("a", 0.1, tags={"lang": "en"})
    harness.publish("a", 0.2, tags={"lang": "de", "x=y": "z"})
    harness.publish("b", 0.3)

    def found(path: str, key: str, tag: str) -> list[Any]:
        return [item[key] for item in ok(client.get(path, params={"tag": tag}))["data"]]

    assert found("/v1/tasks", "task", "lang") == ["a"]
    assert found("/v1/tasks", "task", "lang=fr") == []
    assert found("/v1/tasks/a/versions", "version", "lang") == [1, 2]
    assert found("/v1/tasks/a/versions", "version", "lang=de") == [2]
    assert found("/v1/tasks/a/versions", "version", "lang=") == []


def test_a_task_and_its_versions(harness: Harness, client: TestClient) -> None:
    harness.publish("a", 0.1, description="first")
    version = harness.publish("a", 0.2, labels=["x", "y"]).version
    assert ok(client.get("/v1/tasks/a")) == {
        "object": "task",
        "task": "a",
        "versions": [1, 2],
        "aliases": {"latest": 2},
    }
    body = ok(client.get("/v1/tasks/a/versions/2"))
    expected = {
        "task": "a",
        "version": 2,
        "reference": "a:2",
        "aliases": ["latest"],
        "pins": 0,
        "digest": version.digest,
        "labels": ["x", "y"],
        "num_virtual_tokens": NUM_VIRTUAL_TOKENS,
        "peft_type": "PROMPT_TUNING",
    }
    assert {key: body[key] for key in expected} == expected
    assert ok(client.get("/v1/tasks/a/versions/1"))["description"] == "first"
    pin = harness.registry.pin("a")
    assert ok(client.get("/v1/tasks/a/versions/2"))["pins"] == 1
    pin.release()


def test_files_come_back_as_they_were(harness: Harness, client: TestClient) -> None:
    harness.publish("a", 0.25)
    names = {"adapter_config.json": "adapter_config", "adapter_model.safetensors": "adapter_model"}
    for name, part in names.items():
        reply = client.get(f"/v1/tasks/a/versions/1/files/{name}")
        assert reply.status_code == 200 and reply.content == files(0.25)[part]
        assert reply.headers["etag"] == f'"sha256:{hashlib.sha256(reply.content).hexdigest()}"'
    manifest = client.get("/v1/tasks/a/versions/1/files/manifest.json")
    assert manifest.headers["content-type"] == "application/json"
    assert json.loads(manifest.content)["num_virtual_tokens"] == NUM_VIRTUAL_TOKENS


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("{etag}", 304),
        ("W/{etag}", 304),
        ('"other", {etag}', 304),
        ("*", 304),
        ('"other"', 200),
        ('W/"other" , "more"', 200),
        ("", 400),
        ("unquoted", 400),
        ("{etag} garbage", 400),
        ('"a"b"', 400),
    ],
)
def test_if_none_match_of_a_file(harness: Harness, client: TestClient, header: str, status: int) -> None:
    harness.publish("a")
    path = "/v1/tasks/a/versions/1/files/adapter_model.safetensors"
    etag = client.get(path).headers["etag"]
    reply = client.get(path, headers={"if-none-match": header.format(etag=etag)})
    assert reply.status_code == status
    if status == 304:
        assert reply.content == b"" and reply.headers["etag"] == etag


# Header values over the states of the alias `prod`, of which {etag} is the current one.
ALIAS_MATRIX = [
    ({}, "absent", 428),
    ({}, "present", 428),
    ({"if-none-match": "*"}, "absent", 201),
    ({"if-none-match": "*"}, "present", 412),
    ({"if-match": "{etag}"}, "absent", 412),
    ({"if-match": "{etag}"}, "present", 200),
    ({"if-match": "*"}, "absent", 412),
    ({"if-match": "*"}, "present", 200),
    ({"if-match": '"999"'}, "present", 412),
    ({"if-match": '"999", {etag}'}, "present", 200),
    ({"if-match": "W/{etag}"}, "present", 412),
    ({"if-match": "3"}, "present", 400),
    ({"if-match": ""}, "present", 400),
    ({"if-match": '"'}, "present", 400),
    ({"if-none-match": '"3"'}, "absent", 400),
    ({"if-match": "{etag}", "if-none-match": "*"}, "present", 400),
]


@pytest.mark.parametrize(("headers", "state", "status"), ALIAS_MATRIX)
def test_alias_preconditions(
    harness: Harness, client: TestClient, headers: dict[str, str], state: str, status: int
) -> None:
    harness.publish("a", 0.1)
    harness.publish("a", 0.2)
    etag = '"1"'
    if state == "present":
        harness.registry.move_alias("a", "prod", 1, expected=None)
        etag = client.get("/v1/tasks/a/aliases/prod").headers["etag"]
    sent = {name: value.format(etag=etag) for name, value in headers.items()}
    reply = client.put("/v1/tasks/a/aliases/prod", json={"version": 2}, headers=sent)
    assert reply.status_code == status, reply.text
    alias = harness.registry.task("a").aliases.get("prod")
    if status in (200, 201):
        assert ok(reply, status) == {"task": "a", "alias": "prod", "version": 2}
        assert reply.headers["etag"] == f'"{alias.etag}"' != etag
    else:
        assert (alias and alias.version) == (1 if state == "present" else None), "nothing may change"


def test_a_stale_etag_loses(harness: Harness, client: TestClient) -> None:
    harness.publish("a", 0.1)
    harness.publish("a", 0.2)
    path = "/v1/tasks/a/aliases/latest"
    etag = client.get(path).headers["etag"]
    assert client.put(path, json={"version": 1}, headers={"if-match": etag}).status_code == 200
    reply = client.put(path, json={"version": 2}, headers={"if-match": etag})
    assert code(reply) == (412, "precondition_failed")
    assert ok(client.get(path))["version"] == 1


@pytest.mark.parametrize(("if_match", "status"), [("{etag}", 412), ("*", 200)])
def test_a_race_between_request_and_write(
    harness: Harness, client: TestClient, monkeypatch: pytest.MonkeyPatch, if_match: str, status: int
) -> None:
    """What is there when it is written counts: one who named an etag loses, one who named none does not."""
    harness.publish("a", 0.1)
    harness.publish("a", 0.2)
    etag = client.get("/v1/tasks/a/aliases/latest").headers["etag"]
    move = harness.registry.move_alias

    def slip_in(task: str, alias: str, version: int, **arguments: Any) -> Any:
        move(task, alias, 1, expected=harness.registry.task(task).aliases[alias].etag)
        return move(task, alias, version, **arguments)

    monkeypatch.setattr(harness.registry, "move_alias", slip_in)
    headers = {"if-match": if_match.format(etag=etag)}
    reply = client.put("/v1/tasks/a/aliases/latest", json={"version": 2}, headers=headers)
    assert reply.status_code == status
    assert ok(client.get("/v1/tasks/a/aliases/latest"))["version"] == (1 if status == 412 else 2)


def test_what_another_process_did_just_now_is_known_to_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers on one folder, of which the second never refreshes by itself."""
    monkeypatch.setattr("app.main.REFRESH_INTERVAL", 3600.0)
    here, there = Harness.create(tmp_path / "prompts"), Harness.create(tmp_path / "prompts")
    prod = "/v1/tasks/a/aliases/prod"
    with here.client() as one, there.client() as other:
        for content in (0.1, 0.2, 0.3):
            here.publish("a", content)
        first = other.put(prod, json={"version": 1}, headers={"if-none-match": "*"})
        assert first.status_code == 201, "a task that is new"
        for writer, version in ((one, 2), (other, 3), (one, 1)):
            reply = writer.put(prod, json={"version": version}, headers={"if-match": first.headers["etag"]})
            assert reply.status_code == 200, reply.text
            first = reply
        back = other.post(f"{prod}:rollback", headers={"if-match": first.headers["etag"]})
        assert ok(back)["version"] == 3
        stale = one.put(prod, json={"version": 2}, headers={"if-match": first.headers["etag"]})
        assert code(stale) == (412, "precondition_failed")
        assert one.delete(prod, headers={"if-match": back.headers["etag"]}).status_code == 200
        assert code(other.post(f"{prod}:rollback", headers={"if-match": "*"})) == (404, "not_found")
        # And what is published here can be deleted there.
        number = here.publish("a", 0.4).version.number
        here.publish("a", 0.5)
        assert ok(other.delete(f"/v1/tasks/a/versions/{number}"))["id"] == f"a:{number}"
        here.publish("b", 0.1)
        assert ok(other.delete("/v1/tasks/b"))["deleted"]
        assert len(there.engine.unloaded) == 2


@pytest.mark.parametrize(
    ("task", "alias", "body", "status"),
    [
        ("nope", "prod", {"version": 1}, 404),
        ("a", "prod", {"version": 9}, 404),
        ("a", "12", {"version": 1}, 400),
        ("a", "Prod", {"version": 1}, 400),
        ("a", "prod", {"version": "1"}, 400),
        ("a", "prod", {"version": True}, 400),
        ("a", "prod", {"version": 0}, 400),
        ("a", "prod", {}, 400),
        ("a", "prod", {"version": 1, "weights": {"1": 1.0}}, 400),
        ("a", "prod", {"weights": {}}, 400),
        ("a", "prod", {"weights": {"1": 0}}, 400),
        ("a", "prod", {"weights": {"1": -1, "2": 2}}, 400),
        ("a", "prod", {"weights": {"1": 1e308, "2": 1e308, "3": 1e-308}}, 400),
        ("a", "prod", {"weights": {"1": 1e300, "2": 1e-300}}, 400),
        ("a", "prod", {"weights": {"01": 1, "1": 1}}, 400),
        ("a", "prod", {"weights": {"x": 1}}, 400),
        ("a", "prod", {"weights": {"1": True}}, 400),
        ("a", "prod", {"weights": {str(n): 1 for n in range(1, 18)}}, 400),
        ("a", "prod", {"weights": {"1": 0.5, "9": 0.5}}, 404),
    ],
)
def test_bad_aliases(
    harness: Harness, client: TestClient, task: str, alias: str, body: dict[str, Any], status: int
) -> None:
    harness.publish("a")
    reply = client.put(f"/v1/tasks/{task}/aliases/{alias}", json=body, headers={"if-none-match": "*"})
    assert reply.status_code == status, reply.text
    assert set(harness.registry.task("a").aliases) == {"latest"}


def test_delete_version(harness: Harness, client: TestClient) -> None:
    digest = harness.publish("a", 0.1).version.digest
    harness.publish("a", 0.2)
    assert code(client.delete("/v1/tasks/a/versions/2")) == (412, "precondition_failed")
    assert ok(client.delete("/v1/tasks/a/versions/1")) == {"id": "a:1", "object": "version", "deleted": True}
    assert harness.engine.unloaded == [digest]
    assert code(client.get("/v1/tasks/a/versions/1")) == (404, "not_found")
    assert code(client.delete("/v1/tasks/a/versions/1")) == (404, "not_found")


def test_delete_task(harness: Harness, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.publish("a", 0.1)
    harness.publish("a", 0.2)
    harness.registry.move_alias("a", "prod", 1, expected=None)
    assert code(client.delete("/v1/tasks/a")) == (412, "precondition_failed")
    harness.publish("b", 0.3)

    async def refuse(digest: str) -> None:
        harness.engine.unloaded.append(digest)
        raise NotReady("the engine is not running")

    monkeypatch.setattr(harness.engine, "unload", refuse)
    assert ok(client.delete("/v1/tasks/b")) == {"id": "b", "object": "task", "deleted": True}
    assert len(harness.engine.unloaded) == 1
    assert [task["task"] for task in ok(client.get("/v1/tasks"))["data"]] == ["a"]
    assert code(client.delete("/v1/tasks/b")) == (404, "not_found")


def test_models(harness: Harness, client: TestClient) -> None:
    version = harness.publish("a", 0.1).version
    harness.publish("b", 0.2)
    harness.registry.move_alias("a", "prod", 1, expected=None)
    listed = ok(client.get("/v1/models"))
    base, a, b = listed["data"]
    assert listed["object"] == "list" and not listed["has_more"]
    assert base["id"] == "tiny-llama" and base["parent"] is None and base["num_virtual_tokens"] == 0
    assert (a["id"], b["id"]) == ("a", "b")
    assert a == {
        "id": "a",
        "object": "model",
        "created": a["created"],
        "owned_by": "softprompt",
        "parent": "tiny-llama",
        "task": "a",
        "version": 1,
        "digest": version.digest,
        "aliases": ["latest", "prod"],
        "num_virtual_tokens": NUM_VIRTUAL_TOKENS,
        "max_model_len": 512,
    }
    assert abs(a["created"] - base["created"]) < 60
    for reference in ("a", "a:1", "a@prod", f"a@{version.digest}"):
        assert ok(client.get(f"/v1/models/{reference}")) == {**a, "id": reference}
    assert ok(client.get("/v1/models/tiny-llama")) == base
    assert code(client.get("/v1/models/c")) == (404, "not_found")


def test_a_task_without_its_default_alias_is_listed_by_version(client: TestClient) -> None:
    reply = client.post("/v1/tasks/a/versions?alias=", files=files(0.1))
    assert ok(reply, 201)["aliases"] == []
    listed = ok(client.get("/v1/models"))["data"][1]
    assert listed["id"] == "a:1"
    assert ok(client.get(f"/v1/models/{listed['id']}"))["version"] == 1
