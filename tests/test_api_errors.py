"""What hostile and mistaken requests get: one body, bounded, without an echo, and never a 5xx."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.testclient import TestClient

from app.api.body import read_chunks
from app.errors import BodyTooLarge, InvalidRequest
from tests.api_harness import Harness
from tests.hostile_values import MARK

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    harness = Harness.create(tmp_path_factory.mktemp("errors") / "prompts", max_body_bytes=10_000)
    harness.publish("sentiment")
    return harness


@pytest.fixture(scope="module")
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


def check(reply: Any, status: int, code: str | None = None) -> dict[str, Any]:
    """Assert the one error body and return its `error`."""
    assert reply.status_code == status, reply.text[:500]
    assert reply.headers["content-type"] == "application/problem+json"
    body = json.loads(reply.content)
    assert list(body) == ["type", "title", "status", "detail", "instance", "error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["status"] == status and body["detail"] == body["error"]["message"]
    assert body["type"] == f"urn:softprompt:problem:{body['error']['code']}"
    assert body["instance"] == f"urn:softprompt:request:{reply.headers['x-request-id']}"
    assert code is None or body["error"]["code"] == code
    assert len(reply.content) < 3_000 and reply.content.isascii()
    assert MARK not in reply.text and "Traceback" not in reply.text
    return body["error"]


HOSTILE: dict[str, bytes] = {
    "nan": b'{"input": "x", "temperature": NaN}',
    "infinity": b'{"input": "x", "temperature": Infinity}',
    "minus infinity": b'{"input": "x", "top_p": -Infinity}',
    "1e999": b'{"input": "x", "temperature": 1e999}',
    "nan where a string belongs": b'{"input": NaN}',
    "nan in an unknown field": b'{"input": "x", "zzz": [NaN]}',
    "5000 digits": b'{"input": "x", "seed": ' + b"7" * 5000 + b"}",
    "400 digits in a float": b'{"input": "x", "temperature": ' + b"7" * 400 + b"}",
    "2**70": b'{"input": "x", "seed": 1180591620717411303424}',
    "-2**70": b'{"input": "x", "seed": -1180591620717411303424}',
    "lone surrogate": b'{"input": "MARKER8412 \\ud800"}',
    "lone surrogate in a list": b'{"input": ["MARKER8412 \\udfff"]}',
    "lone surrogate in a key": b'{"\\ud800": 1, "input": "x"}',
    "lone surrogate in task": b'{"input": "x", "task": "\\ud83d"}',
    "duplicate key": b'{"input": "MARKER8412", "input": "MARKER8412"}',
    "duplicate key inside": b'{"input": "x", "zzz": {"a": "MARKER8412", "a": 2}}',
    "deep list": b'{"input": ' + b"[" * 4000 + b"]" * 4000 + b"}",
    "deep object": b'{"a":' * 900 + b"1" + b"}" * 900,
    "unclosed depth": b"[" * 9000,
    "empty": b"",
    "space": b" \n ",
    "array": b'["MARKER8412"]',
    "string": b'"MARKER8412"',
    "number": b"3",
    "null": b"null",
    "true": b"true",
    "trailing data": b'{"input": "x"} {"input": "MARKER8412"}',
    "trailing comma": b'{"input": "x",}',
    "truncated": b'{"input": "MARKER8412',
    "single quotes": b"{'input': 'MARKER8412'}",
    "comment": b'{"input": "x" /* MARKER8412 */}',
    "byte order mark": b'\xef\xbb\xbf{"input": "x"}',
    "utf-16": '{"input": "x"}'.encode("utf-16"),
    "bad utf-8": b'{"input": "MARKER8412 \xff"}',
    "overlong utf-8": b'{"input": "\xc0\xaf"}',
    "raw control character": b'{"input": "MARKER8412 \x00"}',
    "raw newline": b'{"input": "MARKER8412 \n"}',
    "bad escape": b'{"input": "MARKER8412 \\x41"}',
    "leading zero": b'{"input": "x", "seed": 01}',
    "plus sign": b'{"input": "x", "seed": +1}',
    "hexadecimal": b'{"input": "x", "seed": 0x10}',
    "__proto__": b'{"input": "x", "__proto__": {"MARKER8412": true}}',
    "long unknown key": b'{"input": "x", "' + MARK.encode() * 500 + b'": 1}',
    "control characters in a key": b'{"input": "x", "\\u001b[31mMARKER8412\\r\\n": 1}',
    "big wrong value": b'{"input": "x", "seed": "' + MARK.encode() * 900 + b'"}',
    "input is an object": b'{"input": {"MARKER8412": "MARKER8412"}}',
    "tag of a union": b'{"input": "x", "response_format": {"type": "MARKER8412"}}',
    "beside the tag of a union": b'{"input": "x", "response_format": {"type": "text", "MARKER8412": 1}}',
}
ROUTES = ("/v1/generate", "/v1/classify")


@pytest.mark.parametrize("route", ROUTES)
def test_hostile_json(harness: Harness, client: TestClient, route: str) -> None:
    for name, body in HOSTILE.items():
        reply = client.post(route, content=body, headers=JSON)
        assert reply.status_code == 400, f"{name}: {reply.text[:500]}"
        check(reply, 400)
    assert not harness.engine.calls


def test_a_tag_is_answered_with_those_that_there_are(client: TestClient) -> None:
    body = {"input": "x", "response_format": {"type": MARK}}
    error = check(client.post("/v1/generate", json=body), 400)
    assert error["param"] == "response_format"
    assert error["message"] == "response_format: 'type' must be one of 'text', 'json_object', 'json_schema'"


def test_hostile_json_in_a_put(client: TestClient) -> None:
    for name, body in HOSTILE.items():
        reply = client.put("/v1/tasks/sentiment/aliases/prod", content=body, headers={**JSON, "if-none-match": "*"})
        assert reply.status_code == 400, f"{name}: {reply.text[:500]}"
        check(reply, 400)


def test_harmless_oddities_are_accepted(client: TestClient) -> None:
    for body in (b'{"input": "\\u0000 \\ud83d\\ude00"}', b' {"input": "x"} \n', b'{"input": "x", "top_p": 1}'):
        assert client.post("/v1/generate", content=body, headers=JSON).status_code == 200, body


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": ""},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json; charset=MARKER8412"},
        {"content-type": "application/jsonp"},
        {"content-type": ";;;=\"'"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "application/json", "content-encoding": "br, MARKER8412"},
    ],
)
def test_unsupported_media_types(client: TestClient, headers: dict[str, str]) -> None:
    check(client.post("/v1/generate", content=b'{"input": "x"}', headers=headers), 415, "unsupported_media_type")


@pytest.mark.parametrize("content_type", ["application/json;charset=UTF-8", 'Application/JSON; charset="utf-8"'])
def test_supported_media_types(client: TestClient, content_type: str) -> None:
    reply = client.post("/v1/generate", content=b'{"input": "x"}', headers={"content-type": content_type})
    assert reply.status_code == 200


def test_body_limit(client: TestClient) -> None:
    """Declared or counted, to the byte."""
    fits = b'{"input": "x"}'.ljust(10_000)
    assert client.post("/v1/generate", content=fits, headers=JSON).status_code == 200
    check(client.post("/v1/generate", content=fits + b" ", headers=JSON), 413, "body_too_large")
    check(client.post("/v1/generate", content=iter([fits, b" "]), headers=JSON), 413, "body_too_large")


def test_a_body_is_read_no_further_than_its_limit() -> None:
    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    async def read(headers: list[tuple[bytes, bytes]]) -> int:
        request = Request({"type": "http", "headers": headers}, receive)
        return sum([len(chunk) async for chunk in read_chunks(request, 10_000, 5.0)])

    with pytest.raises(BodyTooLarge, match="more than 10000"):
        asyncio.run(read([]))
    assert taken == 11
    with pytest.raises(BodyTooLarge, match="10001 bytes"):
        asyncio.run(read([(b"content-length", b"10001")]))
    assert taken == 11, "what declares too much is not read at all"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nope",
        "/v1",
        "/v1/tasks/",
        "/v1//tasks",
        "/v1/generate/",
        "/openapi.json/x",
        "/static-offline-docs/../main.py",
        "/static-offline-docs/%2e%2e/core.py",
        "/static-offline-docs/nope.js",
        "/v1/tasks/MARKER8412",
        "/v1/tasks/%00",
        "/v1/tasks/..%2f..%2fetc",
        "/v1/tasks/%ff%fe",
        "/v1/tasks/" + "a" * 5000,
        "/v1/tasks/sentiment/versions/0",
        "/v1/tasks/sentiment/versions/2",
        "/v1/tasks/sentiment/versions/01",
        "/v1/tasks/sentiment/versions/-1",
        "/v1/tasks/sentiment/versions/latest",
        "/v1/tasks/sentiment/versions/" + "9" * 5000,
        "/v1/tasks/sentiment/versions/1/files/nope",
        "/v1/tasks/sentiment/versions/1/files/..%2f..%2flog",
        "/v1/tasks/sentiment/versions/1/files/%2e%2e",
        "/v1/tasks/sentiment/aliases/nope",
        "/v1/tasks/sentiment/aliases/1",
        "/v1/models/nope",
        "/v1/models/a/b/c",
        "/v1/models/sentiment@nope",
    ],
)
def test_not_found(client: TestClient, path: str) -> None:
    assert check(client.get(path), 404, "not_found")["param"] is None


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/generate", "POST"),
        ("PUT", "/v1/tasks", "GET"),
        ("OPTIONS", "/v1/generate", "POST"),
        ("HEAD", "/v1/tasks", "GET"),
        ("POST", "/v1/models", "GET"),
        ("TRACE", "/readyz", "GET"),
    ],
)
def test_method_not_allowed(client: TestClient, method: str, path: str, allow: str) -> None:
    reply = client.request(method, path)
    assert reply.status_code == 405 and reply.headers["allow"] == allow
    if method != "HEAD":
        check(reply, 405, "method_not_allowed")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=x", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("after=" + "a" * 201, "after"),
    ],
)
def test_bad_query(client: TestClient, query: str, param: str) -> None:
    assert check(client.get(f"/v1/tasks?{query}"), 400)["param"] == param


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("abc-123_X.y", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("", False),
        ("a b", False),
        ("a\tb", False),
        ('<script>"', False),
        ("é", False),
    ],
)
def test_request_id(client: TestClient, given: str, taken: bool) -> None:
    for path in ("/livez", "/nope", "/docs"):
        found = client.get(path, headers={"x-request-id": given.encode()}).headers["x-request-id"]
        assert (found == given) is taken
        assert found.isascii() and found.replace("-", "").replace("_", "").replace(".", "").isalnum()


def test_request_ids_differ(client: TestClient) -> None:
    assert len({client.get("/livez").headers["x-request-id"] for _ in range(50)}) == 50


def test_unforeseen_exceptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness.create(tmp_path / "prompts")

    def broken() -> None:
        raise RuntimeError(f"{MARK} in /secret/path")

    monkeypatch.setattr(harness.registry, "tasks", broken)
    with harness.client() as client:
        reply = client.get("/v1/tasks", headers={"x-request-id": "mine"})
        error = check(reply, 500, "internal_error")
        assert error["message"] == "the server could not finish this request"
        assert reply.headers["x-request-id"] == "mine"


def test_messages_are_bounded_and_encodable(harness: Harness, client: TestClient) -> None:
    harness.engine.refuse = (0, InvalidRequest("é\ud800" * 5_000, param="input"))
    try:
        error = client.post("/v1/generate", json={"input": "x"}).json()["error"]
        assert error["param"] == "input" and len(error["message"]) == 1_000
    finally:
        harness.engine.refuse = None
