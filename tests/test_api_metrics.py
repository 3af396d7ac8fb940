"""/metrics: what is counted, under which names and labels, and what never is."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from app.api.counts import ABORT_CAUSES, PRUNE_FROM, Counts, Histogram
from app.api.observe import ObserveMiddleware
from app.api.request_stats import RequestStats, Unread
from app.engine import Token
from app.errors import EngineFailed, NotReady, NumericalError, Overloaded
from tests.access_harness import KeyedHarness, bearer
from tests.api_harness import Harness, files, wait_until
from tests.scrape import Scrape

TWINS = {  # vLLM's, from CONTRACT.md
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_success_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
}
OURS = {  # likewise
    "training_jobs",
    "prompt_loads_total",
    "prompt_evictions_total",
    "prompt_resident_bytes",
    "prompt_swaps_total",
    "uploads_rejected_total",
    "aborts_total",
    "engine_restarts_total",
}
BODY = {"task": "mood", "input": "the first", "max_tokens": 100}


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    harness = Harness.create(tmp_path / "prompts", send_timeout=0.3)
    harness.publish("mood", labels=["x", "y"])
    return harness


@pytest.fixture
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


def generate(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/generate", json=BODY | body)


def test_every_name_of_the_contract(tmp_path: Path) -> None:
    harness = Harness.create(tmp_path / "prompts", metrics_compat="vllm")
    harness.publish("mood")
    with harness.client() as client:
        assert generate(client).status_code == 200
        assert client.post("/v1/tasks/mood/versions", content=b"x").status_code == 415
        found = Scrape.by(client)
        assert {f"softprompt_{name}" for name in TWINS | OURS} <= found.names
        assert {name for name in found.names if name.startswith("vllm:") and not re.search("_(sum|count)$", name)} == {
            f"vllm:{name}" for name in TWINS
        }
        for name in TWINS:
            assert found(f"vllm:{name}") == found(name), name
        labels = {label for (name, own), _ in found.samples.items() if name.startswith("vllm:") for label, _ in own}
        assert labels == {"model_name", "engine", "finished_reason", "le"} and found.values("engine") == {"0"}
        assert {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"} <= found.names
        assert not [name for name in found.names if name.endswith("_created")]


def test_without_the_setting_there_are_no_twins(client: TestClient) -> None:
    assert not [name for name in Scrape.by(client).names if name.startswith("vllm:")]


def test_an_answer(harness: Harness, client: TestClient) -> None:
    num_read, num_written = len(harness.tokens("the first")), len(harness.engine.answer)
    assert generate(client).json()["usage"]["completion_tokens"] == num_written > 2
    found = Scrape.by(client)
    assert found("prompt_tokens_total", task="mood") == num_read
    assert found("generation_tokens_total", task="mood") == num_written
    assert found("request_success_total", task="mood", finished_reason="stop") == 1
    assert found("time_to_first_token_seconds_count") == found("request_queue_time_seconds_count") == 1
    assert found("inter_token_latency_seconds_count") == num_written, "the stop token took a step too"
    assert found("e2e_request_latency_seconds_count") == 1
    assert 0 < found("time_to_first_token_seconds_sum") <= found("e2e_request_latency_seconds_sum")
    assert found("aborts_total") == 0 and found("http_requests_total", operation="generate", status="200") == 1
    generate(client, max_tokens=2, n=3, seed=1)
    found = Scrape.by(client)
    assert found("request_success_total", task="mood", finished_reason="length") == 3
    assert found("prompt_tokens_total", task="mood") == 2 * num_read, "an input counts once for all its answers"
    assert found("generation_tokens_total", task="mood") == num_written + 6
    assert found("time_to_first_token_seconds_count") == 4 and found("e2e_request_latency_seconds_count") == 2


@pytest.mark.parametrize("stop", ["positive", "iti"])
def test_an_answer_that_a_stop_string_ends_is_no_abort(harness: Harness, client: TestClient, stop: str) -> None:
    assert generate(client, stop=stop).json()["outputs"][0]["finish_reason"] == "stop"
    assert harness.engine.calls[0].closed
    found = Scrape.by(client)
    assert found("request_success_total", finished_reason="stop") == 1 and found("aborts_total") == 0


def test_every_route_that_generates(client: TestClient) -> None:
    for stream in (False, True):
        generate(client, stream=stream)
        body = {"model": "mood", "max_tokens": 3, "stream": stream}
        assert client.post("/v1/completions", json=body | {"prompt": ["a", "b"], "n": 2}).status_code == 200
        messages = [{"role": "user", "content": "x"}]
        assert client.post("/v1/chat/completions", json=body | {"messages": messages}).status_code == 200
    classified = client.post("/v1/classify", json={"task": "mood", "input": ["a", "bb"]}).json()
    found = Scrape.by(client)
    assert found("request_success_total", task="mood", finished_reason="length") == 10
    assert found("request_success_total", task="mood", finished_reason="scored") == 2
    assert found("e2e_request_latency_seconds_count") == 7 and found("time_to_first_token_seconds_count") == 12
    before = found("prompt_tokens_total", task="mood")
    client.post("/v1/classify", json={"task": "mood", "input": ["a", "bb"]})
    assert Scrape.by(client)("prompt_tokens_total", task="mood") - before == classified["usage"]["prompt_tokens"]


def test_the_members_of_an_ensemble_count_each_for_itself(harness: Harness, client: TestClient) -> None:
    harness.publish("other", 0.7)
    generate(client, task=["mood", "other"])
    found = Scrape.by(client)
    assert found("request_success_total", task="mood") == found("request_success_total", task="other") == 1
    assert found("e2e_request_latency_seconds_count") == 1


def test_the_bare_base_model_is_no_task(harness: Harness, client: TestClient) -> None:
    generate(client, task=None)
    generate(client, task=harness.base.info.name)
    found = Scrape.by(client)
    assert found("request_success_total", task="") == 2
    assert found.values("task") == {""} and found.values("model_name") == {"tiny-llama"}


# -- what ends early ---------------------------------------------------------------------------------------------------


def aborts(client: TestClient) -> dict[str, float]:
    found = Scrape.by(client)
    return {cause: found("aborts_total", cause=cause) for cause in ABORT_CAUSES if found("aborts_total", cause=cause)}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "cause"),
    [(EngineFailed("x"), "error"), (NumericalError("x"), "error"), (NotReady("x"), "shutdown"), (KeyError(), "error")],
)
def test_answers_that_fail(harness: Harness, client: TestClient, error: Exception, cause: str, stream: bool) -> None:
    harness.engine.fail_after = (2, error)
    generate(client, stream=stream)
    assert aborts(client) == {cause: 1}
    found = Scrape.by(client)
    assert found("generation_tokens_total", task="mood") == 2, "what was made was made"
    assert found("request_success_total") == found("e2e_request_latency_seconds_count") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_are_late(harness: Harness, client: TestClient, stream: bool) -> None:
    harness.engine.endless, harness.engine.delay = True, 0.001
    client.post("/v1/generate", json=BODY | {"stream": stream}, headers={"X-Request-Timeout": "0.05"})
    assert aborts(client) == {"deadline": 1}
    assert Scrape.by(client)("http_requests_total", operation="generate", status="200" if stream else "504") == 1


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/classify"])
def test_classifications_that_fail(harness: Harness, client: TestClient, path: str) -> None:
    harness.engine.fail_after = (0, EngineFailed("x"))
    client.post(path, json={"task": "mood", "input": "x"})
    assert aborts(client) == {"error": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_or_stall(harness: Harness, stream: bool) -> None:
    harness.engine.endless, harness.engine.delay = True, 0.001
    counts = harness.metrics.counts
    with harness.listening() as server:
        server.post("/v1/generate", BODY | {"stream": stream}).close()
        wait_until(lambda: counts.aborts["disconnect"] == 1)
        if stream:
            harness.engine.delay = 0.0
            with server.post("/v1/generate", BODY | {"stream": True}, receive_buffer=4096):
                wait_until(lambda: counts.aborts["slow_reader"] == 1)
    assert counts.aborts.total() == 1 + stream and counts.request.buckets()[-1] == ("+Inf", 0.0)


def test_an_input_counts_once_whichever_of_its_answers_begins() -> None:
    counts = Counts(list)
    stats = RequestStats(counts)
    stats.begin("mood")
    text = Unread(7)
    first, second = stats.clock(None, text), stats.clock(None, text)
    first(Token(None, finish_reason="abort"))
    assert counts.all.prompt_tokens == 0
    for _ in range(2):
        second(Token(5))
    first(Token(5))
    assert counts.all.prompt_tokens == stats.num_prompt_tokens == 7 and counts.all.generation_tokens == 3


def test_a_request_that_the_server_ends_is_cut_by_its_shutdown() -> None:
    counts = Counts(list)

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        scope["state"]["stats"].is_admitted = True
        await asyncio.Event().wait()

    async def cancelled() -> None:
        scope: Scope = {"type": "http", "state": {"request_id": "x"}, "method": "POST", "path": "/"}
        asked = ObserveMiddleware(app, counts=counts, tracing=None)(scope, None, None)  # type: ignore[arg-type]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asked, 0.01)

    asyncio.run(cancelled())
    assert counts.aborts["shutdown"] == counts.aborts.total() == 1


def test_what_is_refused_is_not_aborted(harness: Harness, client: TestClient) -> None:
    harness.engine.refuse = (1, Overloaded("full"))
    assert generate(client, input=["a", "b"]).status_code == 503, "the first of them had begun"
    assert generate(client, temperature=-1).status_code == 400
    assert generate(client, task="unknown").status_code == 404
    assert aborts(client) == {}
    found = Scrape.by(client)
    assert [found("http_requests_total", operation="generate", status=s) for s in ("503", "400", "404")] == [1, 1, 1]


def test_refused_uploads_by_code(client: TestClient) -> None:
    for content in (files(), files() | {"adapter_model": b"x" * 100}, files(num_virtual_tokens=9)):
        client.post("/v1/tasks/new/versions", files=content)
    client.post("/v1/tasks/new/versions", content=b"")
    client.post("/v1/tasks/Not_a_name/versions", files=files())
    found = Scrape.by(client)
    codes = {"header_too_large", "num_virtual_tokens_mismatch", "unsupported_media_type", "invalid_request"}
    assert found.values("code") == codes
    assert found("uploads_rejected_total") == 4


# -- labels and their bounds -------------------------------------------------------------------------------------------


def test_tasks_that_the_registry_does_not_hold_have_no_series(harness: Harness, client: TestClient) -> None:
    harness.publish("gone", 0.7)
    for task in ("mood", "gone", "gone:1", "gone@latest", "never\nwas", "gone:2"):
        generate(client, task=task)
    before = Scrape.by(client)
    assert before.values("task") == {"mood", "gone"} and before("request_success_total", task="gone") == 3
    assert client.delete("/v1/tasks/gone").status_code == 200
    assert Scrape.by(client).values("task") == {"mood"}


def test_what_a_deleted_task_did_stays_in_the_sums(tmp_path: Path) -> None:
    harness = Harness.create(tmp_path / "prompts", metrics_compat="vllm")
    harness.publish("mood")
    with harness.client() as client:
        generate(client)
        before = Scrape.by(client)
        client.delete("/v1/tasks/mood")
        after = Scrape.by(client)
    assert after.values("task") == set()
    assert before("vllm:generation_tokens_total") == after("vllm:generation_tokens_total") > 0
    fallen = [key for key, value in before.counters.items() if after.samples.get(key, -1) < value]
    assert fallen and all("task" in dict(labels) for _, labels in fallen), "a task may take its own counts with it"


def test_names_that_come_and_go_are_forgotten() -> None:
    held: list[str] = []
    counts = Counts(lambda: held)
    for number in range(20 * PRUNE_FROM):
        held[:] = ["stays", f"task{number}"]
        counts.of_task("stays").prompt_tokens += 1
        counts.of_task(f"task{number}").prompt_tokens += 1
        assert len(counts._by_task) <= PRUNE_FROM
    assert counts.by_task()["stays"].prompt_tokens == 20 * PRUNE_FROM
    held[:] = [f"task{number}" for number in range(1_000)]
    for name in held:
        counts.of_task(name)
    assert len(counts.by_task()) == 1_000


def test_unknown_paths_are_one_series(client: TestClient) -> None:
    for number in range(20):
        client.get(f"/no/such/{number}")
        client.get(f"/v1/tasks/nobody{number}")
    found = Scrape.by(client)
    assert found("http_requests_total", operation="none", status="404") == 20
    assert found("http_requests_total", operation="get_task", status="404") == 20
    assert len([key for key in found.samples if key[0] == "softprompt_http_requests_total"]) == 2


def test_who_may_read_them(tmp_path: Path) -> None:
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    for task in ("support-a", "support-b", "other"):
        harness.publish(task)
    everything, some = harness.key("metrics"), harness.key("metrics", tasks=["support-*"])
    admin = harness.key("admin")
    with harness.client() as client:
        for task in ("support-a", "support-b", "other", None):
            assert client.post("/v1/generate", json=BODY | {"task": task}, headers=admin).status_code == 200
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers=bearer("sk-wrong")).status_code == 401
        assert client.get("/metrics", headers=harness.key("generate", "prompts:read")).status_code == 403
        for headers in (everything, admin):
            assert Scrape.by(client, headers).values("task") == {"support-a", "support-b", "other", ""}
        assert Scrape.by(client, some).values("task") == {"support-a", "support-b"}


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_swaps_are_counted_wherever_they_come_from(harness: Harness, client: TestClient, tmp_path: Path) -> None:
    def swaps() -> float:
        harness.registry.refresh()
        return Scrape.by(client)("prompt_swaps_total")

    assert swaps() == 0, "a new alias is none"
    harness.publish("mood", 0.7)
    assert swaps() == 1
    Harness.create(tmp_path / "prompts").publish("mood", 0.9)  # another process
    assert swaps() == 2
    client.put("/v1/tasks/mood/aliases/prod", json={"version": 1}, headers={"If-None-Match": "*"})
    client.put("/v1/tasks/mood/aliases/prod", json={"version": 1}, headers={"If-Match": "*"})
    assert swaps() == 2
    client.put("/v1/tasks/mood/aliases/prod", json={"version": 2}, headers={"If-Match": "*"})
    assert swaps() == 3


def test_readiness_and_trouble(harness: Harness, client: TestClient) -> None:
    found = Scrape.by(client)
    assert (found("ready"), found("engine_ready"), found("registry_trouble"), found("tasks")) == (1, 1, 0, 1)
    assert found("build_info", backend="nothing", device="cpu") == 1
    harness.engine.ready, harness.engine.restarts = False, 2
    found = Scrape.by(client)
    assert (found("ready"), found("engine_ready"), found("engine_restarts_total")) == (0, 0, 2)


def test_a_histogram() -> None:
    histogram = Histogram((0.1, 1, 10))
    for value in (0.05, 0.1, 0.11, 1, 9, 10.5, 1000):
        histogram.observe(value)
    assert histogram.buckets() == [("0.1", 2), ("1", 4), ("10", 5), ("+Inf", 7)]
    assert histogram.sum == pytest.approx(1020.76)


def test_two_servers_in_one_process_count_apart(client: TestClient, tmp_path: Path) -> None:
    other = Harness.create(tmp_path / "others")
    generate(client)
    with other.client() as others:
        assert Scrape.by(others)("generation_tokens_total") == 0
    assert Scrape.by(client)("generation_tokens_total") > 0
