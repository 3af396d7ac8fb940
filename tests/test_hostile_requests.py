"""Our own lists of hostile values over every route: the right 4xx, one body, no echo, and nothing that grows."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

from app.api.openai.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from app.api.schemas import ClassifyRequest, GenerateRequest
from app.constraint import MAX_CACHED, MAX_REFUSALS
from tests.api_harness import Harness
from tests.hostile_documents import DOCUMENTS
from tests.hostile_values import ETAGS, NAMES, OUT_OF_RANGE, QUERIES, SCHEMAS, SEARCHES, WRONG
from tests.long_run import SECONDS, SEED, indices, long_count, report
from tests.test_api_errors import check
from tests.tiny import CHAT_TEMPLATE

JSON = {"content-type": "application/json"}
TASK = "/v1/tasks/sentiment"
# Route -> its body, and the least that it takes.
BODIES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/generate": (GenerateRequest, {"input": "x"}),
    "/v1/classify": (ClassifyRequest, {"task": "sentiment", "input": "x"}),
    "/v1/completions": (CompletionRequest, {"model": "sentiment", "prompt": "x"}),
    "/v1/chat/completions": (ChatRequest, {"model": "sentiment", "messages": [{"role": "user", "content": "x"}]}),
    "/tokenize": (TokenizeRequest, {"prompt": "x"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5]}),
}
WITH_BODY = (*(("POST", path) for path in BODIES), ("PUT", f"{TASK}/aliases/prod"))
BY_NAME = (
    *(("GET", "/v1/models/{}"), ("GET", "/v1/tasks/{}"), ("DELETE", "/v1/tasks/{}"), ("GET", "/v1/tasks/{}/versions")),
    *(
        ("GET", "/v1/tasks/{}/versions/1"),
        ("DELETE", "/v1/tasks/{}/versions/1"),
        ("GET", "/v1/tasks/{}/aliases/latest"),
    ),
    *(("GET", "/v1/tasks/sentiment/versions/{}"), ("DELETE", "/v1/tasks/sentiment/versions/{}")),
    *(("GET", "/v1/tasks/sentiment/versions/1/files/{}"), ("GET", "/v1/tasks/sentiment/aliases/{}")),
    *(
        ("POST", "/v1/tasks/{}/versions"),
        ("PUT", "/v1/tasks/{}/aliases/prod"),
        ("PUT", "/v1/tasks/sentiment/aliases/{}"),
    ),
    ("GET", "/{}"),
)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    harness = Harness.create(tmp_path_factory.mktemp("requests") / "prompts", max_body_bytes=100_000)
    harness.publish("sentiment", labels=["x", "y"])
    harness.base.tokenizer.chat_template = CHAT_TEMPLATE
    return harness


@pytest.fixture(scope="module")
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


# What grows by design, and how far.
BOUNDED = {
    "constraints._compiled": MAX_CACHED,
    "constraints._refusals": MAX_REFUSALS,
    "token_texts": 128,
    "metrics.counts.replies": 500,  # operations and statuses that there are
    "metrics.counts.all.finished": 3,  # reasons
    "metrics.counts.rejected_uploads": 50,  # codes
}


@pytest.fixture(autouse=True)
def nothing_changes(harness: Harness, client: TestClient) -> Iterator[None]:
    for path, (_, least) in BODIES.items():  # what the first request of all leaves is no growth
        assert client.post(path, json=least).status_code == 200
    before, sizes_before = state(harness), sizes(client.app_state["server"])
    assert sizes_before.keys() >= {"registry._pins._counts", "registry._prompts._prompts", "access._meters"}
    yield
    harness.engine.calls.clear()
    assert state(harness) == before
    for name, size in sizes(client.app_state["server"]).items():
        assert size <= BOUNDED.get(name, sizes_before.get(name, 0)), f"{name} has grown"


def state(harness: Harness) -> tuple[Any, ...]:
    """Tasks, files and pins."""
    root = Path(harness.settings.registry)
    tasks = {task.name: (list(task.versions), dict(task.aliases)) for task in harness.registry.tasks()}
    return tasks, sorted(map(str, root.rglob("*"))), harness.num_pins


def sizes(part: Any, name: str = "") -> dict[str, int]:
    """How many items there are in every container of the server's parts, and of theirs."""
    if isinstance(part, (Mapping, list, set, deque)):
        return {name: len(part)}
    if not type(part).__module__.startswith("app.") or not hasattr(part, "__dict__"):
        return {}
    found = {}
    for attribute, value in vars(part).items():
        found.update(sizes(value, f"{name}.{attribute}".lstrip(".")))
    return found


@pytest.mark.parametrize("place", ["registry._index", "registry._quarantine", "access", "constraints", "door"])
def test_growth_would_be_seen(client: TestClient, place: str) -> None:
    """A table by what clients send, wherever it is."""
    part = client.app_state["server"]
    for attribute in place.split("."):
        part = getattr(part, attribute)
    before = sizes(client.app_state["server"])
    part.seen = {"a name": 1}
    grown = sizes(client.app_state["server"]).items() - before.items()
    del part.seen
    assert (f"{place}.seen", 1) in grown  # and wherever else the part is held


def send(client: TestClient, method: str, path: str, body: bytes | None = None, **headers: str) -> Any:
    given = {**(JSON if body is not None else {}), **headers}
    return client.request(method, path, content=body, headers={name: value.encode() for name, value in given.items()})


def dump(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def test_documents(client: TestClient) -> None:
    for name, document in DOCUMENTS.items():
        for method, path in WITH_BODY:
            reply = send(client, method, path, document, **({"if-none-match": "*"} if method == "PUT" else {}))
            assert reply.status_code == 400, (name, path, reply.text[:300])
            check(reply, 400, "invalid_json")


def test_every_truncation_of_a_document(client: TestClient) -> None:
    whole = dump({"task": "sentiment", "input": "é\u202e😀", "logit_bias": {"5": -1.5e1}, "stop": ["a", "\\"], "n": 2})
    assert send(client, "POST", "/v1/generate", whole).status_code == 200
    for size in range(len(whole)):
        check(send(client, "POST", "/v1/generate", whole[:size]), 400)


@pytest.mark.parametrize("field", OUT_OF_RANGE)
def test_values_out_of_range(client: TestClient, field: str) -> None:
    for value in OUT_OF_RANGE[field]:
        if field == "n" and value is None:
            continue
        began = time.perf_counter()
        reply = send(client, "POST", "/v1/generate", dump({"input": "x", field: value}))
        if value is None and reply.status_code == 200:
            continue
        error = check(reply, 400)
        assert error["param"] == field, (field, value, error)
        assert time.perf_counter() - began < 1


def test_wrong_types_in_every_field(client: TestClient) -> None:
    """The types are strict, so most are 400; what fits is served, and nothing is anything else."""
    for path, (model, least) in BODIES.items():
        assert send(client, "POST", path, dump(least)).status_code == 200
        # Many fields are of the same kinds: each gets a part of the values, another one than the fields beside it.
        step = 2 if path in ("/v1/generate", "/v1/classify") else 5
        pairs = [
            (field, value) for number, field in enumerate(model.model_fields) for value in WRONG[number % step :: step]
        ]
        for field, value in pairs:
            reply = send(client, "POST", path, dump({**least, field: value}))
            assert reply.status_code in (200, 400, 404), (field, value, reply.text[:300])
            if reply.status_code != 200:
                check(reply, reply.status_code)


def test_names(client: TestClient) -> None:
    for (place, (method, path)), (number, name) in itertools.product(enumerate(BY_NAME), enumerate(NAMES)):
        if (place + number) % 3:  # every name at a third of the routes, every route with a third of the names
            continue
        for quoted in {quote(name, safe="").replace(".", "%2E"), quote(name, safe="/:@")}:
            if "." in quoted.split("/") or ".." in quoted.split("/"):
                continue  # the client itself would resolve it
            if name.strip() in ("", "latest", "."):
                continue
            target = path.format(quoted)
            body = dump({"version": 1}) if method == "PUT" else None
            reply = send(client, method, target, body, **({"if-match": '"stale"'} if method == "PUT" else {}))
            if reply.status_code in (200, 304) and method == "GET":
                continue  # an escaped name of something that is there
            assert 400 <= reply.status_code < 500, (method, target, reply.text[:300])
            check(reply, reply.status_code)
            assert len(name) < 8 or name not in reply.text, "no echo"


def test_references_in_bodies(harness: Harness, client: TestClient) -> None:
    for name in NAMES:
        for path in ("/v1/generate", "/v1/classify"):
            for task in (name, ["sentiment", name]):
                reply = send(client, "POST", path, dump({"task": task, "input": "x"}))
                if name == "latest" or reply.status_code == 200:
                    continue
                assert reply.status_code in (400, 404), (name, reply.text[:300])
                check(reply, reply.status_code)
                assert len(name) < 8 or name not in reply.text
    assert not [call for call in harness.engine.calls if call.releases != 1]


def test_etags(client: TestClient) -> None:
    for tag in ETAGS:
        reply = send(client, "PUT", f"{TASK}/aliases/latest", dump({"version": 1}), **{"if-match": tag})
        assert reply.status_code == 400, (tag, reply.text[:300])
        check(reply, 400)
        reply = send(client, "PUT", f"{TASK}/aliases/new", dump({"version": 1}), **{"if-none-match": tag})
        check(reply, 400)
        path = f"{TASK}/versions/1/files/adapter_config.json"
        check(send(client, "GET", path, **{"if-none-match": tag}), 400)
    for headers, status in (({}, 428), ({"if-match": "*", "if-none-match": "*"}, 400), ({"if-none-match": "*"}, 412)):
        check(send(client, "PUT", f"{TASK}/aliases/latest", dump({"version": 1}), **headers), status)
    for version in (0, -1, 10**9, 2, "1", 1.0, True, None, [1]):
        reply = send(client, "PUT", f"{TASK}/aliases/latest", dump({"version": version}), **{"if-match": "*"})
        assert reply.status_code == (404 if version == 2 and version is not True else 400), (version, reply.text[:200])


def test_queries(client: TestClient) -> None:
    for path in ("/v1/tasks", f"{TASK}/versions"):
        for query in QUERIES:
            check(client.get(f"{path}?{query}"), 400)
        for text in SEARCHES:
            reply = client.get(path, params={"tag": text})
            assert reply.status_code == 200 and reply.json()["data"] == []
            reply = client.get(path, params={"after": text})
            assert reply.status_code == (200 if path == "/v1/tasks" else 400), reply.text  # a name, and a number


def test_request_ids_cannot_forge_a_log(client: TestClient) -> None:
    for text in (
        "a b",
        'a"b',
        "a\tERROR x",
        "\x1b[31m",
        "a" * 129,
        "../x",
        "<b>",
        "%0d%0aX: y",
        "é",
        "a;b",
        "{}",
        "\x7f",
    ):
        found = send(client, "GET", "/nope", **{"x-request-id": text}).headers["x-request-id"]
        assert len(found) == 32 and found.isalnum()


def test_schema_bombs(client: TestClient) -> None:
    """Each is refused, or compiled, within seconds; the event loop answers others all the while."""
    ended, waits = threading.Event(), []

    def others() -> None:
        while not ended.wait(0.02):
            began = time.perf_counter()
            assert client.get("/livez").status_code == 200
            waits.append(time.perf_counter() - began)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for schema in SCHEMAS:
            began = time.perf_counter()
            wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
            body = dump({"input": "x", "max_tokens": 1, "response_format": wanted})
            reply = send(client, "POST", "/v1/generate", body)
            assert reply.status_code in (200, 400, 413, 503), (str(schema)[:100], reply.text[:300])
            if reply.status_code != 200:
                check(reply, reply.status_code)
            assert time.perf_counter() - began < 20, str(schema)[:100]
    finally:
        ended.set()
        thread.join()
    assert sorted(waits)[len(waits) * 99 // 100] < 0.5, "while grammars are compiled, others are served"


def random_request(rng: Random) -> tuple[str, str, bytes | None, dict[str, str]]:
    """Any route with anything from the lists, several at once."""
    method, path = rng.choice((*WITH_BODY, *BY_NAME, ("POST", "/v1/generate"), ("POST", "/v1/classify")))
    path = path.format(quote(rng.choice(NAMES), safe=rng.choice(("", "/:@"))).replace(".", "%2E"))
    if rng.random() < 0.2:
        path += "?" + rng.choice(QUERIES)
    if rng.random() < 0.1:
        method = rng.choice(("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"))
    headers = {"x-request-id": rng.choice(("mine-1", "a b", "\x1b[31m"))} if rng.random() < 0.2 else {}
    if rng.random() < 0.3:
        headers[rng.choice(("if-match", "if-none-match"))] = rng.choice(ETAGS)
    if method not in ("POST", "PUT"):
        return method, path, None, headers
    if rng.random() < 0.3:
        return method, path, rng.choice(list(DOCUMENTS.values())), headers
    # Mostly its own fields, sometimes another route's.
    model, least = BODIES[path if path in BODIES and rng.random() < 0.8 else rng.choice(list(BODIES))]
    body = dict(least)
    fields = sorted(model.model_fields)
    for field in rng.sample(fields, rng.randint(0, min(3, len(fields)))):
        body[field] = rng.choice((*WRONG, *OUT_OF_RANGE.get(field, ())))
    if rng.random() < 0.3:
        body[rng.choice(NAMES)] = rng.choice(WRONG)
    text = dump(body)
    if rng.random() < 0.2:
        place = rng.randrange(len(text))
        text = text[:place] + bytes([rng.randrange(256)]) + text[place + 1 :]
    return method, path, text, headers


def run(harness: Harness, client: TestClient, seed: int, count: int, seconds: float = float("inf")) -> int:
    rng, index = Random(seed), 0
    for index in indices(count, seconds):
        method, path, body, headers = random_request(rng)
        if method == "DELETE" and path in (TASK, f"{TASK}/versions/1"):
            continue
        reply = send(client, method, path, body, **headers)
        assert reply.status_code < 500, (seed, index, method, path, body, reply.text[:300])
        assert reply.headers["x-request-id"]
        if reply.status_code >= 400 and method != "HEAD":
            check(reply, reply.status_code)
        if index % 1_000 == 0:
            harness.engine.calls.clear()
    return index + 1


def test_random_requests(harness: Harness, client: TestClient) -> None:
    run(harness, client, SEED, 500)


@pytest.mark.long
@pytest.mark.timeout(0)
def test_many_random_requests(harness: Harness, client: TestClient, capsys: pytest.CaptureFixture[str]) -> None:
    count = run(harness, client, SEED, long_count(200_000), SECONDS)
    with capsys.disabled():
        report(f"seed {SEED}, {count} requests")
