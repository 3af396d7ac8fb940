"""What POST /v1/generate and /v1/classify make of n, log-probabilities, constraints, salts and ensembles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.constraint import JsonConstraint
from app.engine import SamplingParams
from app.errors import Overloaded
from app.manifest import Defaults
from tests.api_harness import NUM_VIRTUAL_TOKENS, Harness, events


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
    assert call.salt == "tenant"
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


# -- ensembles -----------------------------------------------------------------------------------------------------


def test_the_majority_answers(harness: Harness, client: TestClient) -> None:
    digests = [harness.publish("task", 0.1 * (i + 1)).version.digest for i in range(5)]
    for digest, answer in zip(digests, ["b", "a", "a", "b", "c"], strict=True):
        harness.engine.answers[digest] = harness.tokens(answer)
    references = [f"task:{i}" for i in (1, 2, 3, 4, 5)]
    reply = client.post("/v1/generate", json={"task": references, "input": ["x", "y"]})
    body = reply.json()
    assert [output["text"] for output in body["outputs"]] == ["b", "b"], "of two equals the first named"
    assert body["outputs"][1] == {"index": 1, "text": "b", "finish_reason": "stop", "votes": 2}
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
