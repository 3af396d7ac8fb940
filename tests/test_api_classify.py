"""POST /v1/classify over the fake engine, whose log-likelihoods the tests choose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.api.classify import softmax
from app.errors import ContextLengthExceeded, NumericalError, Overloaded
from tests.api_harness import NUM_VIRTUAL_TOKENS, Harness

LABELS = ["positive", "negative", "mixed"]


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    harness = Harness.create(tmp_path / "prompts")
    harness.publish("sentiment", template="{input}\nSentiment:", labels=LABELS)
    return harness


@pytest.fixture
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


def test_softmax_of_summed_log_likelihoods(harness: Harness, client: TestClient) -> None:
    scores = {" positive": [-1.0, -0.5], " negative": [-0.25], " mixed": [-2.0, -2.0, -3.0]}
    by_tokens = {tuple(harness.tokens(label)): score for label, score in scores.items()}
    harness.engine.logprobs = lambda tokens: by_tokens[tuple(tokens)]
    reply = client.post("/v1/classify", json={"task": "sentiment", "input": ["good", "bad"]})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    weights = [math.exp(sum(score)) for score in scores.values()]
    expected = [weight / sum(weights) for weight in weights]
    for index, result in enumerate(body["results"]):
        assert result["index"] == index and result["label"] == "negative"
        assert list(result["probabilities"]) == LABELS
        assert list(result["probabilities"].values()) == pytest.approx(expected, rel=1e-12)
    assert reply.headers["X-Prompt-Version"] == "sentiment:1" and body["version"] == 1
    texts = [harness.tokens(f"{text}\nSentiment:") for text in ("good", "bad")]
    assert [call.token_ids for call in harness.engine.calls] == texts
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == sum(map(len, texts))
    assert body["usage"]["prompt_tokens_details"]["soft_prompt_tokens"] == 2 * NUM_VIRTUAL_TOKENS
    assert [call.releases for call in harness.engine.calls] == [1, 1] and harness.num_pins == 0


def test_labels_of_the_request_win(harness: Harness, client: TestClient) -> None:
    reply = client.post("/v1/classify", json={"task": "sentiment", "input": "x", "labels": ["yes", "no"]})
    assert list(reply.json()["results"][0]["probabilities"]) == ["yes", "no"]
    assert harness.engine.calls[0].continuations == [harness.tokens(" yes"), harness.tokens(" no")]


def test_bare_base_has_no_template(harness: Harness, client: TestClient) -> None:
    reply = client.post("/v1/classify", json={"input": "good:", "labels": ["yes", "no"]})
    assert reply.status_code == 200 and reply.json()["task"] is None
    assert harness.engine.calls[0].continuations == [harness.tokens("yes"), harness.tokens("no")]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "x"}, "labels"),
        ({"input": "x", "labels": ["one"]}, "labels"),
        ({"input": "x", "labels": ["one", "one"]}, "labels"),
        ({"input": "x", "labels": ["one", ""]}, "labels"),
        ({"input": "x", "labels": "ab"}, "labels"),
        ({"input": ["x"] * 256, "labels": [str(i) for i in range(17)]}, "labels"),
        ({"input": [], "labels": ["a", "b"]}, "input"),
        ({"input": "x", "labels": ["a", "b"], "temperature": 1.0}, "temperature"),
    ],
)
def test_bad_parameters(harness: Harness, client: TestClient, body: dict[str, Any], param: str) -> None:
    reply = client.post("/v1/classify", json=body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param
    assert not harness.engine.calls


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        ({"refuse": (1, Overloaded("no room"))}, 503),
        ({"fail_after": (0, NumericalError("not finite"))}, 500),
        ({"fail_after": (0, ZeroDivisionError("secret"))}, 500),
    ],
)
def test_failures_give_the_pin_back(harness: Harness, client: TestClient, failure: dict[str, Any], status: int) -> None:
    for name, value in failure.items():
        setattr(harness.engine, name, value)
    reply = client.post("/v1/classify", json={"task": "sentiment", "input": ["a", "b", "c"]})
    assert reply.status_code == status and "secret" not in reply.text
    assert {call.releases for call in harness.engine.calls} == {1}
    assert harness.num_pins == 0


def test_the_input_that_is_too_long_is_named(harness: Harness, client: TestClient) -> None:
    harness.engine.refuse = (1, ContextLengthExceeded("too long", param="input"))
    reply = client.post("/v1/classify", json={"task": "sentiment", "input": ["a", "b"]})
    assert reply.status_code == 400 and reply.json()["error"]["message"] == "input[1]: too long"
    assert harness.num_pins == 0


def test_labels_that_the_model_never_gives(harness: Harness, client: TestClient) -> None:
    harness.engine.logprobs = lambda tokens: [-math.inf] * len(tokens)
    reply = client.post("/v1/classify", json={"task": "sentiment", "input": "x"})
    assert reply.status_code == 200
    assert list(reply.json()["results"][0]["probabilities"].values()) == pytest.approx([1 / 3] * 3)


def test_unknown_task(client: TestClient) -> None:
    assert client.post("/v1/classify", json={"task": "nope", "input": "x"}).status_code == 404


def test_softmax_is_safe() -> None:
    assert softmax([-1e5, -1e5 - math.log(3)]) == pytest.approx([0.75, 0.25])
    assert softmax([-math.inf, 0.0]) == [0.0, 1.0]
    assert softmax([-math.inf] * 4) == [0.25] * 4
    assert sum(softmax([-0.1 * i for i in range(1000)])) == pytest.approx(1, abs=1e-15)
