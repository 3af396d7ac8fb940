"""Canaries, rolling back, restoring, history and inspection over HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from starlette.testclient import TestClient

from app.inspection import Mean, similar, virtual_tokens
from app.soft_prompt import SoftPrompt
from tests.api_harness import NUM_VIRTUAL_TOKENS, Harness, files

PROD = "/v1/tasks/a/aliases/prod"


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    harness = Harness.create(tmp_path / "prompts")
    harness.publish("a", 0.1, labels=["x", "y"])
    harness.publish("a", 0.2, labels=["x", "y"])
    return harness


@pytest.fixture
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


def ok(reply: Any, status: int = 200) -> Any:
    assert reply.status_code == status, reply.text
    return reply.json()


def code(reply: Any) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def put(client: TestClient, body: dict[str, Any], path: str = PROD) -> Any:
    current = client.get(path)
    headers = {"if-match": current.headers["etag"]} if current.status_code == 200 else {"if-none-match": "*"}
    return client.put(path, json=body, headers=headers)


def test_a_canary_is_shown_and_chosen_by_user(harness: Harness, client: TestClient) -> None:
    assert ok(put(client, {"weights": {"1": 3, "2": 1}}), 201) == {
        "task": "a",
        "alias": "prod",
        "version": 1,
        "weights": {"1": 0.75, "2": 0.25},
    }
    assert ok(client.get(PROD))["weights"] == {"1": 0.75, "2": 0.25}
    assert ok(client.get("/v1/tasks/a"))["aliases"] == {"latest": 2, "prod": 1}
    assert ok(client.get("/v1/tasks/a/versions/2"))["aliases"] == ["latest", "prod"]
    # A model that is asked for by a canary is drawn as for a request, and whole.
    entries = [ok(client.get("/v1/models/a@prod")) for _ in range(60)]
    shown = {(entry["version"], entry["digest"]) for entry in entries}
    assert shown == {(number, harness.registry.version("a", number).digest) for number in (1, 2)}
    assert code(client.delete("/v1/tasks/a/versions/1")) == (412, "precondition_failed")
    routes = [("/v1/generate", {"max_tokens": 1}), ("/v1/classify", {})]
    for path, fields in routes:
        answers = Counter()
        for user in range(40):
            body = {"task": "a@prod", "input": "x", "user": f"user-{user}", **fields}
            first, second = client.post(path, json=body), client.post(path, json=body)
            assert ok(first)["version"] == ok(second)["version"]
            assert first.headers["x-prompt-version"] == f"a:{first.json()['version']}"
            answers[first.json()["version"]] += 1
        assert answers[1] > answers[2] > 0
    drawn = {ok(client.post("/v1/generate", json={"task": "a@prod", "input": "x"}))["version"] for _ in range(60)}
    assert drawn == {1, 2}


def test_rolling_back(client: TestClient) -> None:
    ok(put(client, {"version": 1}), 201)
    ok(put(client, {"version": 2}))
    assert code(client.post(f"{PROD}:rollback")) == (428, "precondition_required")
    assert code(client.post(f"{PROD}:rollback", headers={"if-none-match": "*"})) == (428, "precondition_required")
    assert code(client.post(f"{PROD}:rollback", headers={"if-match": '"1"'})) == (412, "precondition_failed")
    seen = client.get(PROD).headers["etag"]
    reply = client.post(f"{PROD}:rollback", headers={"if-match": seen})
    assert ok(reply) == {"task": "a", "alias": "prod", "version": 1}
    assert reply.headers["etag"] == client.get(PROD).headers["etag"] != seen
    assert ok(client.post("/v1/generate", json={"task": "a@prod", "input": "x"}))["version"] == 1
    assert code(client.post(f"{PROD}:rollback", headers={"if-match": "*"})) == (412, "precondition_failed")
    assert code(client.post("/v1/tasks/a/aliases/none:rollback", headers={"if-match": "*"})) == (404, "not_found")
    assert code(client.post("/v1/tasks/no/aliases/prod:rollback", headers={"if-match": "*"})) == (404, "not_found")


def test_an_alias_is_removed(client: TestClient) -> None:
    ok(put(client, {"version": 1}), 201)
    assert code(client.delete(PROD)) == (428, "precondition_required")
    assert code(client.delete(PROD, headers={"if-match": '"1"'})) == (412, "precondition_failed")
    reply = client.delete(PROD, headers={"if-match": client.get(PROD).headers["etag"]})
    assert ok(reply) == {"id": "a@prod", "object": "alias", "deleted": True}
    assert code(client.get(PROD)) == code(client.delete(PROD, headers={"if-match": "*"})) == (404, "not_found")
    ok(client.delete("/v1/tasks/a/versions/1"))


def test_a_deleted_version_is_listed_and_restored(harness: Harness, client: TestClient) -> None:
    assert ok(client.get("/v1/tasks/a/versions?deleted=true"))["data"] == []
    before = ok(client.get("/v1/tasks/a/versions/1"))
    ok(client.delete("/v1/tasks/a/versions/1"))
    [deleted] = ok(client.get("/v1/tasks/a/versions?deleted=true"))["data"]
    assert deleted["deleted_at"] > before["created_at"] and {**deleted, "deleted_at": None} == before
    assert ok(client.post("/v1/tasks/a/versions/1:restore")) == before
    for path in ("a/versions/1", "a/versions/9", "a/versions/x", "no/versions/1", "a/versions/01"):
        assert code(client.post(f"/v1/tasks/{path}:restore")) == (404, "not_found"), path
    ok(client.delete("/v1/tasks/a"))
    assert len(ok(client.get("/v1/tasks/a/versions?deleted=true"))["data"]) == 2
    assert code(client.get("/v1/tasks/a")) == (404, "not_found")
    ok(client.post("/v1/tasks/a/versions/2:restore"))
    assert ok(client.get("/v1/tasks/a")) == {"object": "task", "task": "a", "versions": [2], "aliases": {}}
    page = ok(client.get("/v1/tasks/a/versions?deleted=true&after=1"))
    assert page["data"] == []
    harness.registry.collect(retention=0)
    assert code(client.post("/v1/tasks/a/versions/1:restore")) == (404, "not_found")


def test_history(client: TestClient) -> None:
    ok(put(client, {"version": 1}), 201)
    ok(put(client, {"weights": {"1": 1, "2": 1}}))
    ok(client.post(f"{PROD}:rollback", headers={"if-match": client.get(PROD).headers["etag"]}))
    page = ok(client.get("/v1/tasks/a/history?limit=3"))
    assert page["has_more"] and [
        (item["seq"], item["op"], item["alias"], item["version"], item["weights"]) for item in page["data"]
    ] == [
        (5, "roll_back_alias", "prod", 1, None),
        (4, "split_alias", "prod", None, {"1": 0.5, "2": 0.5}),
        (3, "alias", "prod", 1, None),
    ]
    rest = ok(client.get("/v1/tasks/a/history?after=3"))
    assert [(item["op"], item["alias"], item["version"]) for item in rest["data"]] == [
        ("publish", "latest", 2),
        ("publish", "latest", 1),
    ]
    assert not rest["has_more"] and all(item["actor"] == "anonymous" for item in rest["data"])
    assert ok(client.get("/v1/tasks/a/history?after=0"))["data"] == []
    for after in ("x", "-1", "1.5", "٣", "9" * 30):
        assert code(client.get("/v1/tasks/a/history", params={"after": after})) == (400, "invalid_request"), after
    assert code(client.get("/v1/tasks/no/history")) == (404, "not_found")


def test_inspect_names_the_words_that_virtual_tokens_were_made_of(harness: Harness, client: TestClient) -> None:
    table = harness.base.model.get_input_embeddings().weight.detach()
    ids = [7, 3, 11, 5]
    given = files()
    given["adapter_model"] = save({"prompt_embeddings": 3 * table[ids].float().clone()})
    ok(client.post("/v1/tasks/words/versions", files=given), 201)
    reply = ok(client.get("/v1/tasks/words/versions/1/inspect?neighbors=2"))
    assert (reply["kind"], reply["num_virtual_tokens"]) == ("embedding", NUM_VIRTUAL_TOKENS)
    assert [token["nearest"][0]["id"] for token in reply["virtual_tokens"]] == ids
    for token_id, token in zip(ids, reply["virtual_tokens"], strict=True):
        assert len(token["nearest"]) == 2 and token["nearest"][0]["similarity"] == pytest.approx(1, abs=1e-5)
        assert token["nearest"][0]["text"] == harness.base.tokenizer.decode([token_id])
        assert token["norm"] == pytest.approx(3 * float(table[token_id].norm()), rel=1e-5)
    assert reply["embedding_norm"] == pytest.approx(float(table.norm(dim=1).median()), rel=1e-5)
    assert [item["reference"] for item in reply["similar"]] == ["a:2"]
    assert code(client.get("/v1/tasks/words/versions/9/inspect")) == (404, "not_found")
    assert code(client.get("/v1/tasks/words/versions/1/inspect?neighbors=0")) == (400, "invalid_request")


def test_similar_is_the_cosine_of_means_within_a_kind() -> None:
    def prompt(rows: Any, kind: Any = "embedding") -> SoftPrompt:
        return SoftPrompt(kind, torch.tensor(rows), "sha256:" + "0" * 64)

    one = Mean.of(prompt([[1.0, 0.0], [3.0, 0.0]]))
    keys = Mean.of(SoftPrompt("kv", torch.ones(1, 2, 1, 2, 2), "sha256:" + "1" * 64))
    far, near = Mean.of(prompt([[-1.0, 0.0]])), Mean.of(prompt([[2.0, 2.0], [4.0, 4.0]]))
    others = [("far", far), ("near", near), ("kv", keys)]
    found = similar(one, others, limit=5)
    assert found == [{"reference": "near", "similarity": 0.707107}, {"reference": "far", "similarity": -1.0}]
    assert similar(one, others, limit=1) == found[:1]
    assert similar(keys, [("kv", keys), ("x", one)], limit=5) == [{"reference": "kv", "similarity": 1.0}]


def test_keys_and_values_have_norms_per_position() -> None:
    tensor = torch.zeros(2, 2, 3, 4, 5)  # layers, keys and values, heads, positions, head_dim
    tensor[:, 0, :, 1] = 2.0
    tensor[:, 1, :, 3] = 1.0
    tokens = virtual_tokens(SoftPrompt("kv", tensor, ""), torch.zeros(9, 15), str, neighbors=3)
    assert [token["key_norm"] for token in tokens] == pytest.approx([0, 2 * 30**0.5, 0, 0])
    assert [token["value_norm"] for token in tokens] == pytest.approx([0, 0, 0, 30**0.5])
