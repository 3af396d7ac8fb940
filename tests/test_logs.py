"""Log lines: one each whatever was sent, with what is known of the request and nothing that is secret."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app import logs
from app.errors import EngineFailed
from tests.access_harness import KeyedHarness
from tests.api_harness import Harness, wait_until

BODY = {"task": "mood", "input": "the first", "max_tokens": 100}
SECRET = 'a-secret-with\\quotes"inside'
NASTY = 'x\n{"message": "forged"}\r\u2028\x1b[31m\x00'


class Lines:
    """What was logged since the last look."""

    def __init__(self, kind: str) -> None:
        self._stream = io.StringIO()
        self.handler = logging.StreamHandler(self._stream)
        self.handler.setFormatter(logs.formatter(kind, [SECRET]))

    def text(self) -> str:
        found = self._stream.getvalue()
        self._stream.truncate(0)
        self._stream.seek(0)
        return found

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().split("\n")[:-1]]

    def requests(self) -> list[dict[str, Any]]:
        return [record for record in self.records() if record["logger"] == "softprompt.access"]


@pytest.fixture
def listen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Lines]]:
    monkeypatch.setattr(logging.getLogger("httpx2"), "level", logging.WARNING)  # the test's own client
    root = logging.getLogger()
    level, listening = root.level, []

    def start(kind: str = "json") -> Lines:
        lines = Lines(kind)
        root.addHandler(lines.handler)
        root.setLevel(logging.INFO)
        listening.append(lines)
        return lines

    yield start
    root.setLevel(level)
    for lines in listening:
        root.removeHandler(lines.handler)


@pytest.fixture
def lines(listen: Callable[[str], Lines]) -> Lines:
    return listen("json")


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    harness = Harness.create(tmp_path / "prompts")
    harness.publish("mood", labels=["x", "y"])
    return harness


def test_the_line_of_a_request(harness: Harness, lines: Lines) -> None:
    with harness.client() as client:
        lines.text()
        reply = client.post("/v1/generate", json=BODY, headers={"X-Request-Id": "mine-1"}).json()
        [line] = lines.requests()
    assert line.pop("timestamp").endswith("Z") and 0 < line.pop("duration") < 10
    assert line == {
        "level": "info",
        "logger": "softprompt.access",
        "message": "request",
        "request_id": "mine-1",
        "method": "POST",
        "path": "/v1/generate",
        "operation": "generate",
        "status": 200,
        "model": "mood",
        "task": "mood",
        "version": 1,
        "digest": reply["digest"],
        "prompt_tokens": reply["usage"]["prompt_tokens"],
        "completion_tokens": reply["usage"]["completion_tokens"],
        "cached_tokens": 0,
    }


def test_lines_of_other_requests(harness: Harness, lines: Lines) -> None:
    harness.publish("other", 0.7)
    with harness.client() as client:
        lines.text()
        client.post("/v1/classify", json={"task": ["mood", "other"], "input": "x", "labels": ["a", "b"]})
        client.post("/v1/generate", json=BODY | {"task": "nobody"})
        client.get("/v1/tasks/mood?limit=secret")
        client.post("/v1/generate", json=BODY | {"task": None, "stream": True})
        harness.engine.fail_after = (1, EngineFailed("x"))
        client.post("/v1/generate", json=BODY)
        harness.engine.fail_after = (1, RuntimeError("a bug"))
        client.post("/v1/generate", json=BODY)
        scored, unknown, task, bare, failed, broken = lines.requests()
    assert (scored["task"], scored["version"], scored["status"]) == ("mood,other", [1, 1], 200)
    assert (unknown["model"], unknown["error"], unknown["level"]) == ("nobody", "not_found", "info")
    assert "task" not in unknown and "prompt_tokens" not in unknown
    assert task["path"] == "/v1/tasks/mood" and "model" not in task
    assert bare["completion_tokens"] > 0 and "task" not in bare
    assert (failed["error"], failed["cut"], failed["level"]) == ("engine_failed", "error", "warning")
    assert (broken["error"], broken["cut"], broken["status"]) == ("internal_error", "error", 500)


def test_what_asks_all_day_is_quiet_unless_it_is_refused(harness: Harness, lines: Lines) -> None:
    with harness.client() as client:
        lines.text()
        for path in ("/livez", "/readyz", "/health", "/metrics"):
            assert client.get(path).status_code == 200
        assert lines.requests() == []
        harness.engine.ready = False
        client.get("/readyz")
        [line] = lines.requests()
        assert line["error"] == "not_ready" and "cut" not in line, "nothing had begun that could be cut"
        logging.getLogger().setLevel(logging.DEBUG)
        client.get("/livez")
        assert lines.requests()[0]["operation"] == "livez"


def test_prompts_are_logged_only_where_it_is_asked_for(tmp_path: Path, lines: Lines) -> None:
    logging.getLogger().setLevel(logging.DEBUG)
    for wanted in (False, True):
        harness = Harness.create(tmp_path / str(wanted), log_prompts=wanted)
        harness.publish("mood", labels=["x", "y"], template="{input}\nFeeling:")
        with harness.client() as client:
            lines.text()
            client.post("/v1/generate", json=BODY)
            client.post("/v1/classify", json={"task": "mood", "input": ["the first", "x"]})
            client.post("/v1/completions", json={"model": "mood", "prompt": "the first"})
            messages = [{"role": "user", "content": "the first"}]
            client.post("/v1/chat/completions", json={"model": "mood", "messages": messages})
            text = lines.text()
        found = [json.loads(line).get("prompts") for line in text.splitlines() if "softprompt.access" in line]
        if wanted:
            chat = "user: the first\nassistant:"
            assert found == [["the first\nFeeling:"], ["the first\nFeeling:", "x\nFeeling:"], ["the first"], [chat]]
        else:
            assert found == [None] * 4 and "the first" not in text


@pytest.mark.parametrize("kind", ["json", "text"])
def test_nothing_that_is_sent_begins_a_line(harness: Harness, listen: Callable[[str], Lines], kind: str) -> None:
    lines = listen(kind)
    with harness.client() as client:
        lines.text()
        client.get("/v1/tasks/x%0A%7B%22forged%22%7D%0D%E2%80%A8%1B[31m")
        client.get("/%0Aforged", headers={"X-Request-Id": "a b"})
        client.post("/v1/generate", json=BODY | {"task": NASTY, "user": NASTY})
        client.post("/v1/completions", json={"model": NASTY, "prompt": "x"})
        client.post("/v1/tasks/x/versions", files={"adapter_model": b"x", NASTY: b"x"})
        for value in (NASTY, {NASTY: NASTY}):
            logging.getLogger("uvicorn.error").warning("from %s", value, extra={"field": value, "task": [value]})
        text = lines.text()
    found = text.splitlines()
    assert len(found) == text.count("\n") == 8, "with one of the audit; splitlines knows of U+2028"
    assert text.isascii() and all(character.isprintable() for line in found for character in line)
    if kind == "json":
        assert all(json.loads(line)["message"] != "forged" for line in found)
    else:
        assert not [line for line in found if not line[:4].isdigit()]


@pytest.mark.parametrize("kind", ["json", "text"])
def test_secrets_are_struck_out_wherever_they_stand(tmp_path: Path, listen: Callable[[str], Lines], kind: str) -> None:
    lines = listen(kind)
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    headers = harness.key("admin")
    key = headers["Authorization"].split()[1]
    with harness.client() as client:
        lines.text()
        client.get(f"/v1/models/{key}?key={key}", headers=headers)
        client.get("/v1/tasks", headers={"x-api-key": key})
        try:
            raise ValueError(f"{key} {SECRET} postgresql+psycopg://me:sesame@db/keys")
        except ValueError:
            logging.getLogger("app").exception("it failed with %s", SECRET, extra={"header": headers, "more": SECRET})
        text = lines.text()
    assert "operation" in text and "list_tasks" in text and "postgresql+psycopg" in text
    assert logs.STRUCK_OUT in text
    for secret in (key, SECRET, json.dumps(SECRET)[1:-1], "sesame"):
        assert secret not in text
    if kind == "json":
        assert [json.loads(line) for line in text.splitlines()]


def test_the_key_and_not_its_secret_is_named(tmp_path: Path, lines: Lines) -> None:
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    headers = harness.key("prompts:read")
    with harness.client() as client:
        lines.text()
        client.get("/v1/tasks", headers=headers)
        assert client.delete("/v1/tasks/x", headers=headers).status_code == 403
        listed, refused = lines.requests()
    assert listed["key"] == refused["key"] == harness.key_id(headers) and refused["error"] == "permission_denied"


def test_what_is_logged_on_the_way_carries_the_request_id(harness: Harness, lines: Lines) -> None:
    harness.engine.fail_after = (1, RuntimeError("a bug"))
    with harness.client() as client:
        lines.text()
        client.post("/v1/generate", json=BODY | {"stream": True}, headers={"X-Request-Id": "mine-2"})
        found = lines.records()
    [bug] = [record for record in found if record["message"] == "unexpected error"]
    assert bug["request_id"] == "mine-2" and "RuntimeError: a bug" in bug["exception"]
    logging.getLogger("app").warning("afterwards")
    assert "request_id" not in lines.records()[0]


def test_clients_that_leave_have_a_line(harness: Harness, lines: Lines) -> None:
    harness.engine.endless, harness.engine.delay = True, 0.001
    with harness.listening() as server:
        lines.text()
        server.post("/v1/generate", BODY).close()
        wait_until(lambda: harness.metrics.counts.aborts["disconnect"] == 1)
        wait_until(lambda: bool(lines.handler.stream.getvalue()))
        [line] = lines.requests()
    assert (line["cut"], line["status"]) == ("disconnect", 499)


@pytest.mark.parametrize(
    ("kind", "is_terminal", "is_json"),
    [("auto", True, False), ("auto", False, True), ("json", True, True), ("text", False, False)],
)
def test_formats(monkeypatch: pytest.MonkeyPatch, kind: str, is_terminal: bool, is_json: bool) -> None:
    root = logging.getLogger()
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal  # type: ignore[method-assign]
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(logging, "captureWarnings", lambda _: None)
    monkeypatch.setattr(logs, "LIBRARIES", ("some.library",))
    logging.getLogger("some.library").addHandler(logging.NullHandler())
    logs.configure("warning", kind)
    logs.configure("debug", "json")  # changes nothing any more
    for name in ("uvicorn.error", "app.engine.local", "some.library"):
        logging.getLogger(name).warning("told %d times", 2, extra={"task": "a b"})
        logging.getLogger(name).info("not told")
    found = stream.getvalue().splitlines()
    assert len(found) == 3
    if is_json:
        record = json.loads(found[0])
        assert (record["message"], record["logger"], record["task"]) == ("told 2 times", "uvicorn.error", "a b")
    else:
        assert found[0].endswith(' WARNING uvicorn.error: told 2 times task="a b"')
