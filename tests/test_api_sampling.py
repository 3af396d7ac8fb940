"""What POST /v1/generate and /v1/classify make of n, log-probabilities, constraints, salts and ensembles."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from starlette.testclient import TestClient

from app.api.deps import MAX_WAITING_SCHEMAS
from app.api.json_text import JsonText, dump_json
from app.api.logprobs import TokenTexts, logprob_entries
from app.constraint import JsonConstraint
from app.engine import Logprob, SamplingParams
from app.errors import InvalidRequest, Overloaded
from app.manifest import Defaults
from tests.api_harness import NUM_VIRTUAL_TOKENS, Harness, events, wait_until


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness.create(tmp_path / "prompts")


@pytest.fixture
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


def post(client: TestClient, path: str = "/v1/generate", **body: Any) -> dict[str, Any]:
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_every_field_reaches_the_sampler(harness: Harness, client: TestClient) -> None:
    post(
        client,
        input="x",
        max_tokens=9,
        min_tokens=2,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={"7": -100, "0": 1.5},
        stop_token_ids=[3, 4],
        ignore_eos=True,
        cache_salt="tenant",
    )
    [call] = harness.engine.calls
    assert call.params == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.0,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        logit_bias={7: -100.0, 0: 1.5},
        stop_token_ids=frozenset({3, 4}),
    )
    assert call.salt == "0:tenant"
    post(client, input="x", stop_token_ids=[3])
    assert harness.engine.calls[-1].params.stop_token_ids == harness.base.eos_token_ids | {3}


def test_n_answers_for_each_input(harness: Harness, client: TestClient) -> None:
    body = post(client, input=["a", "bb"], n=3, temperature=1, seed=5)
    assert [output["index"] for output in body["outputs"]] == list(range(6))
    texts = [call.token_ids for call in harness.engine.calls]
    assert texts == [harness.tokens("a")] * 3 + [harness.tokens("bb")] * 3
    seeds = [call.params.seed for call in harness.engine.calls]
    assert seeds[0] == 5 and seeds[:3] == seeds[3:] and len(set(seeds)) == 3
    assert body["usage"]["prompt_tokens"] == len(harness.tokens("a")) + len(harness.tokens("bb")), "each input once"
    assert body["usage"]["completion_tokens"] == 6 * len(harness.engine.answer)
    post(client, input="a", n=2, temperature=1)
    assert [call.params.seed for call in harness.engine.calls[6:]] == [None, None]


def test_cached_tokens_are_those_of_the_inputs(harness: Harness, client: TestClient) -> None:
    harness.engine.num_cached_tokens = 3
    usage = post(client, input=["abcdef", "abcdefg"], n=2)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 6


@pytest.mark.parametrize("streamed", [False, True])
def test_logprobs(harness: Harness, client: TestClient, streamed: bool) -> None:
    harness.answer("né€ x")
    body = {"input": "abc", "logprobs": 2, "prompt_logprobs": 0, "stop": ["x"]}
    if streamed:
        reply = client.post("/v1/generate", json={**body, "stream": True})
        found = [event for event in events(reply.text) if "index" in event]
        assert all("prompt_logprobs" not in event for event in found[1:]), "said once"
        logprobs = [entry for event in found for entry in event["logprobs"]]
    else:
        found = post(client, **body)["outputs"]
        logprobs = found[0]["logprobs"]
    assert [entry["id"] for entry in logprobs] == harness.engine.answer, "every token's, held back or not"
    decode = harness.base.tokenizer.decode
    first = harness.engine.answer[0]
    assert logprobs[0] == {
        "token": "n",
        "id": first,
        "logprob": -0.5,
        "top_logprobs": [
            {"token": "n", "id": first, "logprob": -0.5},
            {"token": decode([5]), "id": 5, "logprob": -1.5},
        ],
    }
    prompt = found[0]["prompt_logprobs"]
    assert prompt[0] is None and [entry["id"] for entry in prompt[1:]] == harness.tokens("abc")[1:]
    assert [entry["token"] for entry in prompt[1:]] == ["b", "c"]


def test_no_answer_but_the_logprobs_of_the_input(harness: Harness, client: TestClient) -> None:
    assert client.post("/v1/generate", json={"input": "abc", "max_tokens": 0}).status_code == 400
    post(client, input="abc", max_tokens=0, prompt_logprobs=1)
    assert harness.engine.calls[-1].params.max_tokens == 0


def test_impossible_tokens_have_a_finite_logprob(harness: Harness, client: TestClient) -> None:
    harness.engine.logprob = -math.inf
    body = {"input": "abc", "logprobs": 1, "prompt_logprobs": 0}
    [output] = post(client, **body)["outputs"]
    streamed = events(client.post("/v1/generate", json={**body, "stream": True}).text)
    for found in (output, streamed[0]):
        assert [entry["logprob"] for entry in found["prompt_logprobs"][1:]] == [-9999.0] * 2
        assert {entry["logprob"] for entry in found["logprobs"]} == {-9999.0}
        assert {top["logprob"] for entry in found["logprobs"] for top in entry["top_logprobs"]} == {-9999.0, -1.5}


@pytest.mark.parametrize("streamed", [False, True])
def test_tokens_of_a_large_reply_are_decoded_once_and_not_in_the_event_loop(
    harness: Harness, client: TestClient, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    decoded: list[int] = []
    threads: set[int] = set()
    tokenizer = harness.base.tokenizer
    decode, generate = tokenizer.decode, harness.engine.generate
    loops: set[int] = set()

    def recording(ids: list[int], **options: Any) -> Any:
        if not options:  # else it is for the text of the answer
            decoded.extend(ids)
            threads.add(threading.get_ident())
        return decode(ids, **options)

    def generate_in_loop(*args: Any, **kwargs: Any) -> Any:
        loops.add(threading.get_ident())
        return generate(*args, **kwargs)

    monkeypatch.setattr(tokenizer, "decode", recording)
    monkeypatch.setattr(harness.engine, "generate", generate_in_loop)
    texts = ["abcdefghij" * 50] * 4
    for _ in range(2):
        reply = client.post("/v1/generate", json={"input": texts, "prompt_logprobs": 0, "stream": streamed})
        assert reply.status_code == 200
        outputs = (
            [event for event in events(reply.text) if "prompt_logprobs" in event]
            if streamed
            else reply.json()["outputs"]
        )
        assert [len(output["prompt_logprobs"]) for output in outputs] == [len(harness.tokens(text)) for text in texts]
    assert decoded and len(decoded) == len(set(decoded))
    assert threads and not threads & loops


def longest_silence(work: Callable[[], Awaitable[object]]) -> float:
    """Seconds for which the event loop stood still during the work, at most; the best of some tries."""

    async def attempt() -> float:
        longest, last = 0.0, time.monotonic()

        async def tick() -> None:
            nonlocal longest, last
            while True:
                await asyncio.sleep(0.001)
                now = time.monotonic()
                longest, last = max(longest, now - last), now

        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0.005)
        await work()
        await asyncio.sleep(0.005)
        ticking.cancel()
        return longest

    return min(asyncio.run(attempt()) for _ in range(3))


def test_a_large_reply_does_not_stop_the_event_loop(harness: Harness) -> None:
    texts = TokenTexts(harness.base.tokenizer)
    found = [None, *(Logprob(i % 128, -i / 7, tuple((j, -j / 3) for j in range(20))) for i in range(10_000))]
    written: list[bytes] = []

    async def work() -> None:
        entries = await anyio.to_thread.run_sync(logprob_entries, texts, found)
        written.append(dump_json({"id": "x", "outputs": [{"index": 0, "prompt_logprobs": entries}]}))

    assert longest_silence(work) < 0.1
    first, *entries = json.loads(written[0])["outputs"][0]["prompt_logprobs"]
    assert first is None and len(entries) == 10_000
    decode = harness.base.tokenizer.decode
    for entry, item in zip(entries, found[1:], strict=True):
        assert item is not None and [entry["id"], entry["logprob"]] == [item.id, item.logprob]
        assert [(top["id"], top["logprob"]) for top in entry["top_logprobs"]] == list(item.top)
        assert entry["token"] == decode([item.id])


@pytest.mark.parametrize("ascii_only", [False, True])
def test_json_text_is_part_of_json(ascii_only: bool) -> None:
    value = {"é": [1, 2.5, None, True, [], {}, {"\u2028": 'a"\n€'}], "empty": {}, "": ""}
    found = dump_json(value, ascii_only=ascii_only)
    assert found == json.dumps(value, ensure_ascii=ascii_only, separators=(",", ":")).encode()
    assert dump_json({"a": [{"b": JsonText("[1]")}, JsonText("2")]}) == b'{"a":[{"b":[1]},2]}'
    with pytest.raises(ValueError):
        dump_json({"bad": [math.nan]})


def test_logprobs_that_were_not_asked_for_are_not_there(client: TestClient) -> None:
    assert post(client, input="abc")["outputs"][0].keys() == {"index", "text", "finish_reason"}


def test_stop_strings_wait_for_min_tokens(harness: Harness, client: TestClient) -> None:
    harness.answer("abcabc")
    assert post(client, input="x", stop="c")["outputs"][0]["text"] == "ab"
    assert post(client, input="x", stop="c", min_tokens=3)["outputs"][0]["text"] == "abcab"


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "integer"}}},
    ],
)
def test_a_constraint_for_every_answer(harness: Harness, client: TestClient, response_format: dict[str, Any]) -> None:
    post(client, input=["a", "b"], n=2, response_format=response_format)
    constraints = [call.constraint for call in harness.engine.calls]
    assert all(isinstance(constraint, JsonConstraint) for constraint in constraints)
    assert len(set(map(id, constraints))) == 4
    start = harness.tokens("{" if response_format["type"] == "json_object" else "7")[0]
    word = constraints[0].mask()[start // 32] if constraints[0] else 0  # type: ignore[union-attr]
    assert int(word) >> start % 32 & 1
    post(client, input="a", response_format={"type": "text"})
    assert harness.engine.calls[-1].constraint is None


def test_expensive_schemas_wait_for_each_other_and_nobody_else(
    harness: Harness, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than there are threads for everything: the rest is answered all the same."""
    harness.publish("task")
    go_on = threading.Event()
    trials: list[str] = []

    def slow(grammar: str) -> None:
        trials.append(grammar)
        go_on.wait(20)
        raise InvalidRequest("too slow", param="response_format")

    client.post("/v1/generate", json={"input": "x", "response_format": {"type": "json_object"}})
    monkeypatch.setattr("app.constraint._try", slow)

    def ask(number: int) -> int:
        schema = {"type": "json_schema", "json_schema": {"schema": {"const": number}}}
        return client.post("/v1/generate", json={"input": "x", "response_format": schema}).status_code

    with ThreadPoolExecutor(60) as threads:
        asked = [threads.submit(ask, number) for number in range(60)]
        try:
            wait_until(lambda: sum(future.done() for future in asked) >= 60 - 1 - MAX_WAITING_SCHEMAS)
            assert post(client, task="task", input="x")["version"] == 1
            assert post(client, task="task", input="x", response_format={"type": "json_object"})["outputs"], "is known"
            assert len(trials) == 1
        finally:
            go_on.set()
        statuses = Counter(future.result() for future in asked)
    assert statuses == {503: 60 - 1 - MAX_WAITING_SCHEMAS, 400: 1 + MAX_WAITING_SCHEMAS}
    assert ask(int(json.loads(trials[0])["grammars"][0]["json_schema"]["const"])) == 400, "at once"
    assert len(trials) == 1 + MAX_WAITING_SCHEMAS


# -- ensembles -----------------------------------------------------------------------------------------------------


def test_the_majority_answers(harness: Harness, client: TestClient) -> None:
    digests = [harness.publish("task", 0.1 * (i + 1)).version.digest for i in range(5)]
    for digest, answer in zip(digests, ["b", "a", "a", "b", "c"], strict=True):
        harness.engine.answers[digest] = harness.tokens(answer)
    references = [f"task:{i}" for i in (1, 2, 3, 4, 5)]
    reply = client.post("/v1/generate", json={"task": references, "input": ["x", "y"]})
    body = reply.json()
    assert [output["text"] for output in body["outputs"]] == ["b", "b"], "of two equals the first named"
    assert body["outputs"][1] == {"index": 1, "input_index": 1, "text": "b", "finish_reason": "stop", "votes": 2}
    assert body["task"] is None and body["version"] is None and body["digest"] is None
    assert body["members"] == [{"task": "task", "version": i + 1, "digest": digest} for i, digest in enumerate(digests)]
    assert reply.headers["X-Prompt-Version"] == ", ".join(references)
    assert reply.headers["X-Prompt-Digest"] == ", ".join(digests)
    assert body["usage"]["prompt_tokens"] == 5 * (len(harness.tokens("x")) + len(harness.tokens("y")))
    assert body["usage"]["prompt_tokens_details"]["soft_prompt_tokens"] == 10 * NUM_VIRTUAL_TOKENS
    body = post(client, task=["task:1", "task:2", "task:3"], input="x")
    assert body["outputs"][0] == {"index": 0, "text": "a", "finish_reason": "stop", "votes": 2}
    assert harness.num_pins == 0


def test_each_member_has_its_own_template_and_defaults(harness: Harness, client: TestClient) -> None:
    harness.publish("one", 0.1, template="{input}?", defaults=Defaults(max_tokens=3))
    harness.publish("two", 0.2, template="{input}!")
    body = post(client, task=["one", "two", "tiny-llama"], input="x")
    assert [call.token_ids for call in harness.engine.calls] == [harness.tokens(text) for text in ("x?", "x!", "x")]
    assert [call.params.max_tokens for call in harness.engine.calls] == [3, 128, 128]
    assert [member["task"] for member in body["members"]] == ["one", "two", None]


def test_members_may_have_the_same_bytes_but_not_be_the_same(harness: Harness, client: TestClient) -> None:
    digests = {harness.publish(task, 0.1).version.digest for task in ("one", "two")}
    assert len(digests) == 1
    body = post(client, task=["one", "two"], input="x")
    assert [(member["task"], member["version"]) for member in body["members"]] == [("one", 1), ("two", 1)]
    reply = client.post("/v1/generate", json={"task": ["one", "two", "one:1"], "input": "x"})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "task"


def test_a_list_of_one_is_no_ensemble(harness: Harness, client: TestClient) -> None:
    harness.publish("task")
    body = post(client, task=["task"], input="x", n=2)
    assert body["task"] == "task" and "members" not in body and "votes" not in body["outputs"][0]


def test_an_ensemble_starts_as_a_whole_or_not_at_all(harness: Harness, client: TestClient) -> None:
    harness.publish("task", 0.1)
    assert client.post("/v1/generate", json={"task": ["task", "nope"], "input": "x"}).status_code == 404
    harness.publish("task", 0.2)
    harness.engine.refuse = (1, Overloaded("no room"))
    assert client.post("/v1/generate", json={"task": ["task:1", "task:2"], "input": "x"}).status_code == 503
    assert [call.closed for call in harness.engine.calls] == [True]
    assert harness.num_pins == 0


def test_probabilities_of_an_ensemble_are_its_members_mean(harness: Harness, client: TestClient) -> None:
    labels = ["yes", "no"]
    for i in range(2):
        harness.publish("task", 0.1 * (i + 1), labels=labels if i else labels[::-1], template="{input}" + "?!"[i])
    digests = [version.digest for version in harness.registry.task("task").versions.values()]

    def scale(digest: str, text: list[int]) -> float:
        return (1 + digests.index(digest)) * len(text)

    harness.engine.scale = lambda call: scale(call.prompt.digest if call.prompt else "", call.token_ids)
    body = post(client, "/v1/classify", task=["task:1", "task:2"], input=["a", "bb"])
    assert [member["digest"] for member in body["members"]] == digests
    texts = [harness.tokens(text) for text in ("a?", "bb?", "a!", "bb!")]
    assert [call.token_ids for call in harness.engine.calls] == texts
    by_call = []
    for number, text in enumerate(texts):
        weights = [
            math.exp(-0.5 * len(harness.tokens(label)) * scale(digests[number // 2], text)) for label in (" yes", " no")
        ]
        by_call.append(weights[0] / sum(weights))
    assert len(set(by_call)) == 4
    for index, result in enumerate(body["results"]):
        expected = (by_call[index] + by_call[index + 2]) / 2
        assert result["probabilities"]["yes"] == pytest.approx(expected)
        assert sum(result["probabilities"].values()) == pytest.approx(1)
    assert harness.num_pins == 0


def test_an_ensemble_needs_one_set_of_labels(harness: Harness, client: TestClient) -> None:
    harness.publish("one", 0.1, labels=["a", "b"])
    harness.publish("two", 0.2, labels=["a", "c"])
    reply = client.post("/v1/classify", json={"task": ["one", "two"], "input": "x"})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "labels"
    assert post(client, "/v1/classify", task=["one", "two"], input="x", labels=["a", "b"])["results"]
    many = [str(i) for i in range(100)]
    reply = client.post("/v1/classify", json={"task": ["one", "two"], "input": ["x"] * 30, "labels": many})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "labels"
