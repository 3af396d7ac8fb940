"""Health, description of the server, its documentation, and the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from starlette.testclient import TestClient

import app
from app.access import Scope
from app.api.schemas import ClassifyReply, GenerateReply
from scripts import reference
from tests.api_harness import Harness, wait_until

METHODS = {"get", "put", "post", "delete"}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness.create(tmp_path_factory.mktemp("ops") / "prompts")


@pytest.fixture(scope="module")
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method} {path}", operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    ]


def test_the_reference_is_made_from_the_document(document: dict[str, Any]) -> None:
    assert reference.PATH.read_text() == reference.render(document), "run `python -m scripts.reference`"


def test_the_document_says_what_a_key_must_allow(document: dict[str, Any]) -> None:
    found = {name: (operation.get("x-scope"), "security" in operation) for name, operation in operations(document)}
    assert found["post /v1/chat/completions"] == ("generate", True)
    assert found["put /v1/tasks/{task}/aliases/{alias}"] == ("aliases:write", True)
    assert found["get /v1/models"] == (None, True), "any key"
    assert {name for name, (_, secured) in found.items() if not secured} == {
        f"get /{name}" for name in ("livez", "readyz", "health", "version")
    }
    assert {scope for scope, _ in found.values()} <= {None, *get_args(Scope)}
    schemes = document["components"]["securitySchemes"]
    assert {scheme["type"] for scheme in schemes.values()} == {"http", "apiKey"}


def test_trouble_of_the_registry_is_a_detail_of_readiness(tmp_path: Path) -> None:
    """And names no task: everybody may ask."""
    root = tmp_path / "prompts"
    harness = Harness.create(root)
    for task in ("alpha", "beta", "gamma"):
        harness.publish(task)

    def found(client: TestClient) -> str:
        harness.registry.refresh()
        assert client.get("/readyz").json() == {"status": "ready"}
        reply = client.get("/readyz?verbose")
        assert reply.status_code == 200
        registry: str = reply.json()["checks"]["registry"]
        return registry

    def status(client: TestClient) -> int:
        return client.post("/v1/generate", json={"task": "alpha", "input": "x"}).status_code

    with harness.client() as client:
        assert found(client) == "ok"
        for task in ("alpha", "beta"):
            (root / task / "log/00000002.json").write_bytes(b"{")
        assert found(client) == "2 tasks whose log cannot be used"
        for task in ("alpha", "beta"):
            (root / task / "log/00000002.json").unlink()
        assert found(client) == "ok"
        root.rename(tmp_path / "aside")
        assert found(client) == "not refreshed: the registry's storage failed: No such file or directory"
        root.mkdir()  # where something was mounted
        assert found(client) == "3 tasks whose log cannot be used" and status(client) == 503
        root.rmdir()
        (tmp_path / "aside").rename(root)
        assert found(client) == "ok" and status(client) == 200


@pytest.mark.parametrize("path", ["/readyz", "/health"])
def test_readiness(harness: Harness, client: TestClient, path: str) -> None:
    assert client.get(path).json() == {"status": "ready"}
    checks = client.get(f"{path}?verbose").json()["checks"]
    assert checks == {"server": "ok", "engine": "ok", "registry": "ok"}
    harness.engine.seconds_since_progress = 5.0
    try:
        reply = client.get(path)
        assert reply.status_code == 503 and reply.headers["retry-after"] == "5"
        assert reply.json()["detail"] == "engine: no progress for 5 seconds"
        assert client.get("/livez").status_code == 200, "a dead engine is no reason to say the process is"
    finally:
        harness.engine.seconds_since_progress = 0.0
    harness.engine.ready = False
    try:
        assert client.get(path).json()["detail"] == "engine: down"
    finally:
        harness.engine.ready = True
    harness.app.state.readiness.draining = True
    try:
        assert client.get(path).json()["detail"] == "server: draining"
    finally:
        harness.app.state.readiness.draining = False
    assert client.get(path).status_code == 200


def test_version_and_info(harness: Harness, client: TestClient) -> None:
    assert client.get("/version").json() == {"version": app.__version__}
    info = client.get("/info").json()
    base = harness.base.info
    assert info["base"] == {
        "name": "tiny-llama",
        "fingerprint": base.fingerprint,
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "device": "cpu",
        "hidden_size": 32,
        "num_layers": 3,
        "max_model_len": 512,
    }
    assert info["tasks"] == 0 and info["engine"]["kv_blocks_total"] == 8
    assert str(harness.base.path) not in client.get("/info").text


def test_docs_load_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs").text
    urls = re.findall(r"""(?:src|href|url)["']?\s*[=:]\s*["']([^"']+)""", page)
    assert len(urls) >= 4
    for url in urls:
        assert url.startswith("/") and not url.startswith("//"), url
        assert client.get(url).status_code == 200, url
    assert "//" not in re.sub(r"(?m)^\s*//.*$", "", page).replace("</", ""), "no absolute URL of any kind"
    assert '"validatorUrl": null' in page
    assert client.get("/redoc").status_code == 404


def test_every_operation_is_described(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1") and document["info"]["version"] == app.__version__
    found = operations(document)
    names = [operation["operationId"] for _, operation in found]
    assert len(set(names)) == len(names) == len(found)
    for where, operation in found:
        assert operation["tags"], where
        assert operation["summary"], where
        assert {"4XX", "5XX"} <= operation["responses"].keys(), where
        assert "422" not in operation["responses"], f"{where}: validation errors are 400 here"


def test_operation_ids_are_stable(document: dict[str, Any]) -> None:
    """Generated clients take their method names from them."""
    assert {where: operation["operationId"] for where, operation in operations(document)} == {
        "post /v1/generate": "generate",
        "post /v1/classify": "classify",
        "post /v1/completions": "create_completion",
        "post /v1/chat/completions": "create_chat_completion",
        "post /tokenize": "tokenize",
        "post /detokenize": "detokenize",
        "get /v1/models": "list_models",
        "get /v1/models/{reference}": "get_model",
        "get /v1/tasks": "list_tasks",
        "get /v1/tasks/{task}": "get_task",
        "delete /v1/tasks/{task}": "delete_task",
        "get /v1/tasks/{task}/versions": "list_versions",
        "post /v1/tasks/{task}/versions": "publish_version",
        "get /v1/tasks/{task}/versions/{version}": "get_version",
        "delete /v1/tasks/{task}/versions/{version}": "delete_version",
        "get /v1/tasks/{task}/versions/{version}/files/{name}": "get_file",
        "get /v1/tasks/{task}/aliases/{alias}": "get_alias",
        "put /v1/tasks/{task}/aliases/{alias}": "put_alias",
        "delete /v1/tasks/{task}/aliases/{alias}": "delete_alias",
        "post /v1/tasks/{task}/aliases/{alias}:rollback": "roll_back_alias",
        "get /v1/tasks/{task}/history": "get_history",
        "get /v1/tasks/{task}/versions/{version}/inspect": "inspect_version",
        "post /v1/tasks/{task}/versions/{version}:restore": "restore_version",
        "post /v1/files": "create_file",
        "get /v1/files": "list_files",
        "get /v1/files/{file}": "retrieve_file",
        "get /v1/files/{file}/content": "retrieve_file_content",
        "delete /v1/files/{file}": "delete_file",
        "post /v1/fine_tuning/jobs": "create_fine_tuning_job",
        "get /v1/fine_tuning/jobs": "list_fine_tuning_jobs",
        "get /v1/fine_tuning/jobs/{job}": "retrieve_fine_tuning_job",
        "get /v1/fine_tuning/jobs/{job}/events": "list_fine_tuning_events",
        "get /v1/fine_tuning/jobs/{job}/checkpoints": "list_fine_tuning_checkpoints",
        "get /v1/fine_tuning/jobs/{job}/report": "retrieve_fine_tuning_report",
        "post /v1/fine_tuning/jobs/{job}/cancel": "cancel_fine_tuning_job",
        "post /v1/fine_tuning/jobs/{job}/pause": "pause_fine_tuning_job",
        "post /v1/fine_tuning/jobs/{job}/resume": "resume_fine_tuning_job",
        "get /v1/audit": "list_audit",
        "get /livez": "livez",
        "get /readyz": "readyz",
        "get /health": "health",
        "get /version": "version",
        "get /metrics": "metrics",
        "get /info": "info",
    }


def test_every_body_has_an_example_that_is_valid(client: TestClient, document: dict[str, Any]) -> None:
    bodies = [operation["requestBody"] for _, operation in operations(document) if "requestBody" in operation]
    assert len(bodies) == 10
    for body in bodies:
        assert body["required"]
        for content in body["content"].values():
            assert content["schema"] and all("value" in example for example in content["examples"].values())
    generation = ("/v1/generate", "/v1/classify", "/v1/completions", "/v1/chat/completions")
    for path in (*generation, "/tokenize", "/detokenize", "/v1/fine_tuning/jobs"):
        examples = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["examples"]
        for example in examples.values():
            # 404: the example's task is not there. A wrong field would be a 400.
            assert client.post(path, json=example["value"]).status_code in (200, 404)


def test_every_reference_in_the_document_resolves(document: dict[str, Any]) -> None:
    text = str(document)
    names = set(re.findall(r"#/components/schemas/(\w+)", text))
    assert names and names <= document["components"]["schemas"].keys()
    assert "#/$defs/" not in text and "HTTPValidationError" not in text


def test_what_only_some_replies_have_is_documented_as_optional(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    expected = {
        "GenerateReply": {"members"},
        "ClassifyReply": {"members"},
        "Output": {"input_index", "logprobs", "prompt_logprobs", "votes"},
        "TokenLogprob": set(),
        "TopLogprob": set(),
        "Usage": set(),
    }
    assert {name: schemas[name]["properties"].keys() - schemas[name]["required"] for name in expected} == expected


def test_documented_replies_are_what_is_sent(harness: Harness, client: TestClient) -> None:
    """The replies that bypass FastAPI's own serialisation, against the models that document them."""
    harness.publish("documented")
    body = {"task": "documented", "input": "x", "logprobs": 1, "prompt_logprobs": 0}
    reply = client.post("/v1/generate", json=body)
    assert GenerateReply.model_validate_json(reply.content, extra="forbid")
    reply = client.post("/v1/classify", json={"task": "documented", "input": "x", "labels": ["a", "b"]})
    assert ClassifyReply.model_validate_json(reply.content, extra="forbid")
    harness.registry.delete_task("documented")


def test_lifespan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It picks up what another process publishes, and stops the engine at the end."""
    monkeypatch.setattr("app.main.REFRESH_INTERVAL", 0.05)
    harness = Harness.create(tmp_path / "prompts")
    with harness.client() as client:
        Harness.create(tmp_path / "prompts").publish("elsewhere")
        wait_until(lambda: client.get("/v1/tasks/elsewhere").status_code == 200)
        assert harness.engine.stopped == 0
    assert harness.engine.stopped == 1
