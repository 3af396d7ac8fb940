"""POST /v1/tasks/{task}/versions: multipart and raw bodies, what is refused, and that nothing is left of that."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from starlette.testclient import TestClient

from app.api.deps import MAX_UPLOADS
from app.errors import NumericalError, Overloaded, StorageFull
from tests.api_harness import Harness, files, wait_until
from tests.tiny import tiny_base

PATH = "/v1/tasks/sentiment/versions"
RAW = {"content-type": "application/octet-stream"}


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness.create(tmp_path / "prompts", max_upload_bytes=100_000)


@pytest.fixture
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_outside_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An upload may be spooled nowhere: temporary files would have to land here."""
    tiny_base("llama")  # made once a run, in a temporary folder of its own
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spool))
    yield
    assert not list(spool.iterdir())


def raw(content: float = 0.5, **metadata: Any) -> bytes:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    return save({"prompt_embeddings": torch.full((4, 32), content)}, metadata=texts)


CONFIG = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}


def multipart(*parts: tuple[str, bytes], boundary: str = "b0undary", end: bool = True) -> tuple[bytes, dict[str, str]]:
    body = b"".join(
        b'--%s\r\nContent-Disposition: form-data; name="%s"; filename="x"\r\n\r\n%s\r\n'
        % (boundary.encode(), name.encode(), data)
        for name, data in parts
    )
    body += f"--{boundary}--\r\n".encode() if end else b""
    return body, {"content-type": f"multipart/form-data; boundary={boundary}"}


def test_multipart(harness: Harness, client: TestClient) -> None:
    manifest = {"template": "{input}\nA:", "labels": ["x", "y"], "description": "né €"}
    given = {**files(), "manifest": json.dumps(manifest).encode()}
    reply = client.post(PATH, files=given)
    assert reply.status_code == 201, reply.text
    body = reply.json()
    assert (body["task"], body["version"], body["reference"]) == ("sentiment", 1, "sentiment:1")
    assert {key: body[key] for key in manifest} == manifest
    assert body["aliases"] == ["latest"] and body["warnings"] == []
    assert reply.headers["location"] == f"{PATH}/1"
    assert reply.headers["etag"] == f'"{body["digest"]}"'
    assert harness.engine.loaded == [body["digest"]], "it must be tried on the base model"
    for part, name in {"adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors"}.items():
        assert client.get(f"{reply.headers['location']}/files/{name}").content == given[part]


def test_curl_style_fields_without_file_names(client: TestClient) -> None:
    body, headers = multipart(*files().items(), ("manifest", b'{"description": "\xc3\xa9"}'))
    reply = client.post(PATH, content=body.replace(b'; filename="x"', b""), headers=headers)
    assert reply.status_code == 201 and reply.json()["description"] == "é"


def test_raw(client: TestClient) -> None:
    body = raw(adapter_config=CONFIG, manifest={"description": "one file"}, format="pt")
    reply = client.post(PATH, content=body, headers=RAW)
    assert reply.status_code == 201, reply.text
    assert reply.json()["description"] == "one file"
    stored = client.get(f"{reply.headers['location']}/files/adapter_model.safetensors").content
    assert stored == body
    config = client.get(f"{reply.headers['location']}/files/adapter_config.json").json()
    assert config == CONFIG


def test_same_bytes_again(harness: Harness, client: TestClient) -> None:
    first = client.post(PATH, files=files())
    again = client.post(PATH, files=files())
    other = client.post(PATH, files=files(0.75))
    assert [reply.status_code for reply in (first, again, other)] == [201, 200, 201]
    assert first.headers["etag"] == again.headers["etag"] != other.headers["etag"]
    assert first.headers["location"] == again.headers["location"]
    assert [reply.json()["version"] for reply in (first, again, other)] == [1, 1, 2]
    assert list(harness.registry.task("sentiment").versions) == [1, 2]


@pytest.mark.parametrize(("query", "aliases"), [("", ["latest"]), ("?alias=", []), ("?alias=prod", ["prod"])])
def test_alias_to_move(client: TestClient, query: str, aliases: list[str]) -> None:
    assert client.post(PATH + query, files=files()).json()["aliases"] == aliases


def test_warnings_reach_the_uploader(client: TestClient) -> None:
    config = json.dumps({**CONFIG, "auto_mapping": {"base_model_class": "os"}}).encode()
    reply = client.post(PATH, files={**files(), "adapter_config": config})
    assert reply.status_code == 201 and "auto_mapping" in reply.json()["warnings"][0]


MULTIPART_REFUSALS: dict[str, tuple[tuple[bytes, dict[str, str]], int, str | None]] = {
    "no adapter_config": (multipart(("adapter_model", b"x")), 400, "adapter_config"),
    "no adapter_model": (multipart(("adapter_config", b"{}")), 400, "adapter_model"),
    "no parts": (multipart(), 400, "adapter_model"),
    "unknown part": (multipart(*files().items(), ("readme", b"MARKER")), 400, None),
    "part with a path for a name": (multipart(*files().items(), ("../manifest", b"{}")), 400, None),
    "part twice": (multipart(*files().items(), ("adapter_config", b"{}")), 400, "adapter_config"),
    "truncated": (multipart(*files().items(), end=False), 400, None),
    "not multipart at all": ((b"MARKER", {"content-type": "multipart/form-data; boundary=x"}), 400, None),
    "no boundary": ((b"MARKER", {"content-type": "multipart/form-data"}), 400, None),
    "long boundary": (multipart(*files().items(), boundary="b" * 1000), 400, None),
    "wrong boundary": (
        (multipart(*files().items())[0], {"content-type": "multipart/form-data; boundary=y"}),
        400,
        None,
    ),
    "no disposition": (
        (b"--b\r\nContent-Type: x\r\n\r\nMARKER\r\n--b--\r\n", {"content-type": "multipart/form-data; boundary=b"}),
        400,
        None,
    ),
    "endless part header": (
        (b"--b\r\n" + b"X" * 10_000, {"content-type": "multipart/form-data; boundary=b"}),
        400,
        None,
    ),
    "empty manifest": (multipart(*files().items(), ("manifest", b"")), 422, "manifest"),
    "manifest that is no object": (multipart(*files().items(), ("manifest", b'["MARKER"]')), 422, "manifest"),
    "unknown manifest key": (multipart(*files().items(), ("manifest", b'{"evil": "MARKER"}')), 422, "manifest"),
    "pickle": (
        multipart(("adapter_config", files()["adapter_config"]), ("adapter_model", b"\x80\x04MARKER")),
        422,
        "adapter_model",
    ),
    "JSON": ((b"{}", {"content-type": "application/json"}), 415, None),
    "form": ((b"a=b", {"content-type": "application/x-www-form-urlencoded"}), 415, None),
    "zip": ((b"PK\x03\x04", {"content-type": "application/zip"}), 415, None),
    "no type": ((b"", {}), 415, None),
    "gzip": ((b"", {**RAW, "content-encoding": "gzip"}), 415, None),
    "raw, empty": ((b"", RAW), 422, "adapter_model"),
    "raw, huge header": ((b"\xff" * 8 + b"{", RAW), 422, "adapter_model"),
    "raw without configuration": ((raw(format="pt"), RAW), 422, "adapter_config"),
    "raw with a bad configuration": ((raw(adapter_config="MARKER"), RAW), 422, "adapter_config"),
    "raw with a bad manifest": ((raw(adapter_config=CONFIG, manifest="MARKER"), RAW), 422, "manifest"),
    "LoRA": ((raw(adapter_config={"peft_type": "LORA", "num_virtual_tokens": 4}), RAW), 422, "adapter_config"),
    "wrong count": ((raw(adapter_config={**CONFIG, "num_virtual_tokens": 5}), RAW), 422, "adapter_model"),
    "NaN": ((raw(float("nan"), adapter_config=CONFIG), RAW), 422, "adapter_model"),
}


@pytest.mark.parametrize("name", MULTIPART_REFUSALS)
def test_refusals(harness: Harness, client: TestClient, name: str) -> None:
    (body, headers), status, param = MULTIPART_REFUSALS[name]
    reply = client.post(PATH, content=body, headers=headers)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"] == param
    assert "MARKER" not in reply.text
    assert not harness.registry.tasks() and not harness.engine.loaded


def test_size_limit(harness: Harness, client: TestClient) -> None:
    reply = client.post(PATH, content=b"x" * 100_001, headers=RAW)
    assert reply.status_code == 413 and reply.json()["error"]["code"] == "body_too_large"
    body, headers = multipart(("adapter_model", b"x" * 3_000_000))
    assert client.post(PATH, content=iter([body]), headers=headers).status_code == 413
    body, headers = multipart(("adapter_config", b"{}"), ("adapter_model", b"x" * 100_001))
    reply = client.post(PATH, content=body, headers=headers)
    assert reply.status_code == 413 and "adapter_model" in reply.json()["detail"], "framing has room of its own"
    assert not harness.registry.tasks()


def test_the_base_models_name_is_taken(harness: Harness, client: TestClient) -> None:
    reply = client.post(f"/v1/tasks/{harness.base.info.name}/versions", files=files())
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "task"
    assert not harness.registry.tasks()


def test_uploading_again_mends_damaged_files(client: TestClient, tmp_path: Path) -> None:
    assert client.post(PATH, files=files()).status_code == 201
    (tensors,) = tmp_path.rglob("versions/1/adapter_model.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"!")
    task = PATH.split("/")[3]
    assert client.post("/v1/generate", json={"task": task, "input": "a"}).status_code == 503
    again = client.post(PATH, files=files())
    assert again.status_code == 201 and again.json()["version"] == 2 and again.json()["aliases"] == ["latest"]
    assert client.post("/v1/generate", json={"task": task, "input": "a"}).json()["version"] == 2


def test_a_content_type_from_hell_is_a_415(client: TestClient) -> None:
    hostile = {"content-type": "application/json; charset*" + "9" * 5_000 + "=x"}
    reply = client.post("/v1/generate", content=b"{}", headers=hostile)
    assert reply.status_code in (400, 415)
    reply = client.post("/v1/generate", content=b"{}", headers={"content-type": "application/json; charset=utf-16"})
    assert reply.status_code == 415


@pytest.mark.parametrize("top_k", [2**31, 10**19])
def test_defaults_have_the_limits_of_requests(client: TestClient, top_k: int) -> None:
    manifest = json.dumps({"defaults": {"top_k": top_k}}).encode()
    reply = client.post(PATH, files=files() | {"manifest": manifest})
    assert reply.status_code == 422 and reply.json()["error"]["code"] == "invalid_manifest"


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/tasks/Nope/versions", "task"),
        ("/v1/tasks/-rf/versions", "task"),
        ("/v1/tasks/%2e%2e/versions", "task"),
        ("/v1/tasks/a%00/versions", "task"),
        (f"/v1/tasks/{'a' * 65}/versions", "task"),
        (f"{PATH}?alias=7", "alias"),
        (f"{PATH}?alias=../x", "alias"),
    ],
)
def test_names_are_checked_before_the_body_is_read(client: TestClient, path: str, param: str) -> None:
    reply = client.post(path, content=b"not read", headers={"content-type": "text/plain"})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (NumericalError("logits are not finite"), 422, "numerical_error"),
        (Overloaded("no room to try it"), 503, "overloaded"),
    ],
)
def test_a_prompt_that_fails_on_the_base_model(
    harness: Harness, client: TestClient, error: Exception, status: int, code: str
) -> None:
    harness.engine.load_error = error
    reply = client.post(PATH, files=files())
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert not harness.registry.tasks(), "it must not be published"


def test_full_disk(harness: Harness, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StorageFull("no space left")

    monkeypatch.setattr(harness.registry, "publish", full)
    reply = client.post(PATH, files=files())
    assert (reply.status_code, reply.json()["error"]["code"]) == (507, "storage_full")


def test_a_new_version_is_served_at_once(client: TestClient) -> None:
    client.post(PATH, files=files(0.1))
    assert client.post("/v1/generate", json={"task": "sentiment", "input": "x"}).json()["version"] == 1
    client.post(PATH, files=files(0.2))
    reply = client.post("/v1/generate", json={"task": "sentiment", "input": "x"})
    assert reply.headers["X-Prompt-Version"] == "sentiment:2"


def test_uploads_at_once_are_bounded(harness: Harness) -> None:
    """One too many is told so before its body is read, and however an upload ends, its place is free again."""
    given = raw(adapter_config=CONFIG)
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: {RAW['content-type']}\r\nContent-Length: {len(given)}\r\n"
    begin = head.encode() + b"\r\n" + given[:10]
    with harness.listening() as server, ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))

        def num_free() -> int:
            free: int = server.server.lifespan.state["server"].uploads._num_free
            return free

        for _ in range(2):
            held = [connect() for _ in range(MAX_UPLOADS)]
            for connection in held:
                connection.sendall(begin)
            wait_until(lambda: num_free() == 0)
            late = connect()
            late.sendall(head.encode() + b"\r\n")
            answer = late.recv(4096)
            assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in answer
            held[0].sendall(given[10:])
            assert held[0].recv(4096).startswith((b"HTTP/1.1 201 ", b"HTTP/1.1 200 "))
            held[1].sendall(b"x" * len(given[10:]))
            assert held[1].recv(4096).startswith(b"HTTP/1.1 422 ")
            wait_until(lambda: num_free() == 2)
            for connection in held:
                connection.close()
            wait_until(lambda: num_free() == MAX_UPLOADS)
    assert len(harness.registry.task("sentiment").versions) == 1
