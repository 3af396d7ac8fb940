"""The client against a transport that answers from a script: errors, retries, streams, pages."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from app import client as package
from app.api import registry_schemas, schemas
from app.client import (
    AsyncClient,
    BadRequest,
    Client,
    ClientError,
    Conflict,
    ConnectionFailed,
    InvalidReply,
    NotAllowed,
    NotAuthenticated,
    NotFound,
    RateLimited,
    Retries,
    ServerFailed,
    StreamCut,
    TimedOut,
    Unavailable,
    results,
)
from app.client.folder import write_folder
from app.urls import without_password
from tests.shipped import ROOT

Step = httpx.Response | Exception
USAGE = {
    "prompt_tokens": 1,
    "completion_tokens": 2,
    "total_tokens": 3,
    "prompt_tokens_details": {"soft_prompt_tokens": 4, "cached_tokens": 0},
}
MADE_BY = {"id": "gen-1", "task": "mood", "version": 1, "digest": "sha256:1", "system_fingerprint": "fp"}
GENERATED = {**MADE_BY, "outputs": [{"index": 0, "text": "ok", "finish_reason": "stop"}], "usage": USAGE}


class Script(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """One step a request; `slept` are the seconds between."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.requests: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        return self._next(request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        return self._next(request)

    def _next(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        step = self.steps.pop(0)
        if isinstance(step, httpx.RequestError):
            step.request = request
        if isinstance(step, Exception):
            raise step
        return step


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    times: list[float] = []

    async def sleep(seconds: float) -> None:
        times.append(seconds)

    monkeypatch.setattr("time.sleep", times.append)
    monkeypatch.setattr(anyio, "sleep", sleep)
    return times


def client(*steps: Step, **options: Any) -> tuple[Client, Script]:
    script = Script(*steps)
    return Client("http://test", transport=script, **options), script


def refusal(status: int, code: str = "some_code", *, retry_after: int | None = None) -> httpx.Response:
    headers = {"X-Request-Id": "r1"} | ({} if retry_after is None else {"Retry-After": str(retry_after)})
    error = {"message": "no", "type": "invalid_request_error", "param": "task", "code": code}
    return httpx.Response(status, headers=headers, json={"title": "No", "error": error})


def ok(body: Any = GENERATED, **options: Any) -> httpx.Response:
    return httpx.Response(200, json=body, **options)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequest),
        (401, NotAuthenticated),
        (403, NotAllowed),
        (404, NotFound),
        (412, Conflict),
        (413, BadRequest),
        (422, BadRequest),
        (428, Conflict),
        (500, ServerFailed),
        (504, ServerFailed),
        (507, ServerFailed),
    ],
)
def test_a_refusal_says_all_that_the_server_said(status: int, kind: type[ClientError], slept: list[float]) -> None:
    asked, script = client(refusal(status))
    with pytest.raises(ClientError) as caught:
        asked.generate("mood", "hi")
    error = caught.value
    assert type(error) is kind and len(script.requests) == 1 and slept == []
    assert (error.status, error.code, error.message) == (status, "some_code", "no")
    assert (error.param, error.request_id, error.retry_after) == ("task", "r1", None)


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (httpx.Response(200, text="<html>"), InvalidReply),
        (httpx.Response(200, json=[]), InvalidReply),
        (httpx.Response(200, json={**GENERATED, "usage": "none"}), InvalidReply),
        (httpx.Response(302, headers={"Location": "/login"}), InvalidReply),
        (httpx.Response(502, text="<html>Bad gateway"), ServerFailed),
        (httpx.Response(404, json={"detail": "Not Found"}), NotFound),
        (httpx.Response(400, json={"error": "just text"}), BadRequest),
    ],
)
def test_what_is_no_reply_of_this_api_is_an_error_of_the_tree(reply: httpx.Response, kind: type[ClientError]) -> None:
    asked, _ = client(reply)
    with pytest.raises(kind) as caught:
        asked.generate("mood", "hi")
    assert type(caught.value) is kind and caught.value.message


def test_what_the_server_did_not_take_is_asked_again(slept: list[float]) -> None:
    steps = (httpx.ConnectError("refused"), refusal(503, "overloaded", retry_after=2), refusal(429), ok())
    asked, script = client(*steps)
    assert asked.generate("mood", "hi").outputs[0].text == "ok"
    assert len(script.requests) == 4 and len({request.content for request in script.requests}) == 1
    assert 0.25 <= slept[0] <= 0.5 and 2 <= slept[1] <= 2.5 and 1 <= slept[2] <= 2, "no sooner than asked; doubling"


def test_retries_end(slept: list[float]) -> None:
    asked, script = client(*(refusal(503, "overloaded") for _ in range(3)), retries=Retries(most=2))
    with pytest.raises(Unavailable):
        asked.generate("mood", "hi")
    assert len(script.requests) == 3 and len(slept) == 2


@pytest.mark.parametrize("reply", [refusal(429, retry_after=3_600), refusal(503, "prompt_corrupt")])
def test_what_waiting_does_not_mend_is_not_waited_for(reply: httpx.Response, slept: list[float]) -> None:
    asked, _ = client(reply)
    with pytest.raises((RateLimited, Unavailable)):
        asked.generate("mood", "hi")
    assert slept == []


def test_the_longest_wait_holds(slept: list[float]) -> None:
    steps = [httpx.ConnectError("refused") for _ in range(12)]
    asked, _ = client(*steps, retries=Retries(most=11, longest=4))
    with pytest.raises(ConnectionFailed):
        asked.info()
    assert max(slept) <= 4


FOLDER = ROOT / "prompts" / "sentiment_mixed" / "versions" / "1"

CHANGES: list[Callable[[Client], Any]] = [
    lambda c: c.set_alias("mood", "prod", version=2, etag='"1"'),
    lambda c: c.remove_alias("mood", "prod", etag='"1"'),
    lambda c: c.roll_back("mood", "prod", etag='"1"'),
    lambda c: c.delete_version("mood", 1),
    lambda c: c.delete_task("mood"),
    lambda c: c.restore("mood", 1),
    lambda c: c.push("mood", FOLDER),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("lost", "kind"), [(httpx.RemoteProtocolError("gone"), ConnectionFailed), (httpx.ReadTimeout(""), TimedOut)]
)
def test_a_change_whose_reply_was_lost_is_not_made_again(
    change: Callable[[Client], Any], lost: Exception, kind: type[ClientError], slept: list[float]
) -> None:
    asked, script = client(lost)
    with pytest.raises(kind):
        change(asked)
    assert len(script.requests) == 1 and slept == []


def test_what_changes_nothing_is_asked_again_when_its_reply_was_lost(slept: list[float]) -> None:
    asked, _ = client(httpx.RemoteProtocolError("gone"), ok())
    assert asked.generate("mood", "hi").version == 1
    asked, _ = client(httpx.ReadTimeout(""))  # but what is slow is not made slower
    with pytest.raises(TimedOut):
        asked.generate("mood", "hi")
    assert len(slept) == 1


def test_a_server_that_is_not_ready_says_so_at_once(slept: list[float]) -> None:
    asked, _ = client(refusal(503, "not_ready", retry_after=5))
    with pytest.raises(Unavailable, match="no"):
        asked.ready()
    assert slept == []


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    def __init__(self, pieces: Iterable[bytes], end: Exception | None = None) -> None:
        self.pieces, self.end, self.closed = list(pieces), end, False

    def __iter__(self) -> Any:
        yield from self.pieces
        if self.end:
            raise self.end

    async def __aiter__(self) -> Any:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


def sse(*events: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


FIRST, SECOND = (
    {**MADE_BY, "index": 0, "text": "né"},
    {"id": "gen-1", "index": 0, "text": "e\u2028", "finish_reason": "stop"},
)
LAST = {**MADE_BY, "usage": USAGE}
WHOLE = sse(FIRST) + b": ping\n\n" + sse(SECOND, LAST).replace(b"\n", b"\r\n") + b"data: [DONE]\n\n"
SSE = {"Content-Type": "text/event-stream; charset=utf-8", "X-Prompt-Version": "mood:1", "X-Request-Id": "r1"}


def streamed(data: bytes, size: int = 1, end: Exception | None = None) -> tuple[httpx.Response, Pieces]:
    pieces = Pieces((data[start : start + size] for start in range(0, len(data), size)), end)
    return httpx.Response(200, headers=SSE, stream=pieces), pieces


async def read_async(script: Script) -> list[results.StreamEvent]:
    async with (
        AsyncClient("http://test", transport=script) as asked,
        asked.stream("mood", "hi", max_tokens=2) as stream,
    ):
        return [event async for event in stream]


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_in_pieces_of_any_size(size: int) -> None:
    reply, pieces = streamed(WHOLE, size)
    asked, script = client(reply)
    with asked.stream("mood", "hi", max_tokens=2) as stream:
        found = list(stream)
    assert "".join(event.text for event in found) == "née\u2028" and found[1].finish_reason == "stop"
    assert stream.usage is not None and stream.usage.completion_tokens == 2
    assert (stream.version, stream.request_id) == ("mood:1", "r1") and pieces.closed
    assert json.loads(script.requests[0].content) == {"task": "mood", "input": "hi", "max_tokens": 2, "stream": True}
    reply, pieces = streamed(WHOLE, size)
    assert asyncio.run(read_async(Script(reply))) == found and pieces.closed


@pytest.mark.parametrize(
    ("data", "end", "kind"),
    [
        (WHOLE.replace(b"data: [DONE]\n\n", b""), None, StreamCut),
        (sse(FIRST)[:-10], None, StreamCut),
        (b"", None, StreamCut),
        (sse(FIRST), httpx.RemoteProtocolError("peer closed connection"), StreamCut),
        (sse(FIRST), httpx.ReadTimeout(""), TimedOut),
        (
            sse(FIRST, {"error": {"message": "broke", "code": "engine_failed"}}) + b"data: [DONE]\n\n",
            None,
            ServerFailed,
        ),
        (sse(FIRST, {"error": "broke"}), None, InvalidReply),
        (b"data: {\n\n", None, InvalidReply),
        (b"data: []\n\n", None, InvalidReply),
    ],
)
def test_a_stream_that_does_not_end_well_raises(data: bytes, end: Exception | None, kind: type[ClientError]) -> None:
    reply, pieces = streamed(data, 16, end)
    if isinstance(end, httpx.RequestError):
        end.request = httpx.Request("POST", "http://test")
    asked, _ = client(reply)
    with pytest.raises(ClientError) as caught, asked.stream("mood", "hi") as stream:
        list(stream)
    assert type(caught.value) is kind and pieces.closed
    reply, pieces = streamed(data, 16, end)
    with pytest.raises(kind):
        asyncio.run(read_async(Script(reply)))
    assert pieces.closed


def test_an_error_event_says_what_the_server_said() -> None:
    reply, _ = streamed(sse({"error": {"message": "broke", "code": "engine_failed", "param": None}}))
    asked, _ = client(reply)
    with pytest.raises(ServerFailed) as caught, asked.stream("mood", "hi") as stream:
        list(stream)
    assert (caught.value.code, caught.value.message, caught.value.request_id) == ("engine_failed", "broke", "r1")
    assert caught.value.status is None, "the head had said 200"


def test_opening_a_stream_is_retried_and_refused_as_any_call(slept: list[float]) -> None:
    for run in ("sync", "async"):
        good, _ = streamed(WHOLE)
        script = Script(refusal(503, "overloaded"), good, refusal(404))
        if run == "sync":
            asked = Client("http://test", transport=script)
            with asked.stream("mood", "hi") as stream:
                assert len(list(stream)) == 3
            with pytest.raises(NotFound), asked.stream("mood", "hi"):
                pass
        else:
            assert len(asyncio.run(read_async(script))) == 3
            with pytest.raises(NotFound):
                asyncio.run(read_async(script))
    assert len(slept) == 2


def test_a_reply_that_is_no_stream() -> None:
    asked, _ = client(ok())
    with pytest.raises(InvalidReply, match="instead of a stream"), asked.stream("mood", "hi"):
        pass


def test_lists_are_read_page_by_page_and_no_further_than_asked() -> None:
    def page(*names: str, more: bool) -> httpx.Response:
        data = [{"object": "task", "task": name, "versions": [1], "aliases": {}} for name in names]
        return ok({"object": "list", "data": data, "has_more": more})

    def steps() -> list[Step]:
        return [page("a", "b", more=True), page("c", more=False)]

    asked, script = client(*steps())
    assert [task.task for task in asked.tasks(tag="x", page=2)] == ["a", "b", "c"]
    assert [dict(request.url.params) for request in script.requests] == [
        {"tag": "x", "limit": "2"},
        {"tag": "x", "limit": "2", "after": "b"},
    ]
    asked, script = client(*steps())
    assert next(asked.tasks()).task == "a" and len(script.requests) == 1

    async def names() -> list[str]:
        async with AsyncClient("http://test", transport=Script(*steps())) as asked:
            return [task.task async for task in asked.tasks()]

    assert asyncio.run(names()) == ["a", "b", "c"]


def test_async_calls_are_retried_too(slept: list[float]) -> None:
    async def ask() -> Any:
        async with AsyncClient("http://test", transport=Script(refusal(429), ok())) as asked:
            return await asked.generate("mood", ["a"], n=1)

    assert asyncio.run(ask()).outputs[0].text == "ok" and len(slept) == 1


def test_a_part_of_a_path_is_a_part_whatever_it_holds() -> None:
    asked, script = client(refusal(404), refusal(404))
    for name in ("../../v1/audit?x=1#", "mood@prod"):
        with pytest.raises(NotFound):
            asked.model(name)
    assert [request.url.raw_path for request in script.requests] == [
        b"/v1/models/..%2F..%2Fv1%2Faudit%3Fx%3D1%23",
        b"/v1/models/mood%40prod",
    ]


def test_the_key_is_sent_and_never_shown() -> None:
    asked, script = client(ok(), refusal(401), api_key="sk-secret")
    asked.generate("mood", "hi", deadline=2.5)
    assert script.requests[0].headers["authorization"] == "Bearer sk-secret"
    assert script.requests[0].headers["x-request-timeout"] == "2.5"
    with pytest.raises(NotAuthenticated) as caught:
        asked.generate("mood", "hi")
    assert "sk-secret" not in repr(caught.value) + str(caught.value.__dict__)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://"])
def test_a_wrong_address_is_refused_when_it_is_given(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        Client(url)


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-\x1bsecret", "sk-s\u00e9cret", "", "sk secret"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="API key") as caught:
            kind("http://test", api_key=key)
        assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "step",
    [
        httpx.Response(200, text="<html>"),
        httpx.Response(302, headers={"Location": "/login"}),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout(""),
        httpx.RemoteProtocolError("gone"),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", [Client.info, lambda c: c.stream("mood", "hi").__enter__()], ids=["call", "stream"])
def test_a_password_in_the_address_is_in_no_message(step: Step, call: Callable[[Client], Any]) -> None:
    script = Script(step)
    with pytest.raises(ClientError) as caught:
        call(Client("http://me:sesame@test:81/api", transport=script, retries=Retries(most=0)))
    assert "http://***@test:81" in caught.value.message and "sesame" not in caught.value.message


@pytest.mark.parametrize("url", ["me:sesame@test", "http://me:sesame@test:x", "http://me:sesame@", "ftp://a:sesame@b"])
def test_nor_is_it_where_the_address_is_wrong(url: str) -> None:
    with pytest.raises(ValueError, match=r"\*\*\*@.*URL") as caught:
        Client(url)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host:80/v1?a=b#c", "http://host:80/v1?a=b#c"),
        ("http://me:pass@host/v1", "http://***@host/v1"),
        ("http://me:p/a?s#s@w@host", "http://***@host"),
        ("me:pass@host", "***@host"),
    ],
)
def test_urls_as_they_are_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_a_connection_is_used_again_after_a_stream() -> None:
    """The end of the body comes a moment after `[DONE]`, as behind a proxy."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    ends: list[int] = []

    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            while received := connection.recv(65_536):
                if not received.endswith(b"}"):  # the head, before its body
                    continue
                connection.sendall(head + b"%x\r\n%b\r\n" % (len(WHOLE), WHOLE))
                time.sleep(0.02)
                connection.sendall(b"0\r\n\r\n")
                ends.append(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=1, retries=Retries(most=0)) as asked:
            for _ in range(2):
                with asked.stream("mood", "hi") as stream:
                    assert len(list(stream)) == 3
        thread.join()
    assert len(ends) == 2


@pytest.mark.parametrize("end", [httpx.RemoteProtocolError("gone"), httpx.ReadTimeout("")])
def test_an_answer_that_is_whole_is_one_however_its_connection_ends(end: httpx.RequestError) -> None:
    end.request = httpx.Request("POST", "http://test")
    asked, _ = client(streamed(WHOLE, 16, end)[0])
    with asked.stream("mood", "hi") as stream:
        assert len(list(stream)) == 3
    assert len(asyncio.run(read_async(Script(streamed(WHOLE, 16, end)[0])))) == 3


def test_a_folder_is_written_with_the_modes_of_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The umask is the whole process's: to look at it by setting it changes what other threads make meanwhile."""
    monkeypatch.setattr("os.umask", lambda _: pytest.fail("the umask was changed"))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    write_folder(tmp_path / "out", {"file": b"x"})
    for name in ("", "file"):
        assert (tmp_path / "out" / name).stat().st_mode == (tmp_path / "plain" / name).stat().st_mode


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    def methods(kind: type) -> dict[str, str]:
        return {
            name: str(inspect.signature(method).parameters)
            for name, method in vars(kind).items()
            if inspect.isfunction(method) and not name.startswith("_") and hasattr(method, "__wrapped__")
        }

    assert methods(Client) == methods(AsyncClient) and len(methods(Client)) > 20
    assert set(package.__all__) <= set(dir(package))


SENT = {  # what the client reads -> what the server says it sends
    results.Generation: schemas.GenerateReply,
    results.Output: schemas.Output,
    results.Classification: schemas.ClassifyReply,
    results.Label: schemas.Classification,
    results.Usage: schemas.Usage,
    results.TokenLogprob: schemas.TokenLogprob,
    results.Model: schemas.Model,
    results.Task: registry_schemas.TaskReply,
    results.Version: registry_schemas.VersionReply,
    results.Published: registry_schemas.PublishReply,
    results.Alias: registry_schemas.AliasReply,
    results.Change: registry_schemas.HistoryEntry,
    results.Inspection: registry_schemas.InspectReply,
    results.VirtualToken: registry_schemas.VirtualToken,
    results.AuditEntry: schemas.AuditReply,
}
OURS = {"created", "etag", "input_index"}  # out of the status and a header; sent by some servers


@pytest.mark.parametrize("read", SENT, ids=lambda read: read.__name__)
def test_what_is_read_is_what_the_server_sends(read: type[results.Result]) -> None:
    assert read.model_fields.keys() - SENT[read].model_fields.keys() - OURS == set()


def test_the_options_of_a_generation_are_those_of_the_route() -> None:
    sent = set(package.calls.GenerateOptions.__annotations__) | {"task", "input", "stream"}
    assert sent == schemas.GenerateRequest.model_fields.keys()


def test_members_that_are_new_are_kept() -> None:
    asked, _ = client(ok({**GENERATED, "news": {"a": 1}}))
    assert asked.generate("mood", "hi").model_dump()["news"] == {"a": 1}
