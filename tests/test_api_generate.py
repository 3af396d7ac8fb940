"""POST /v1/generate over the fake engine: text, merging of defaults, streams, and pins that always go back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.engine import SamplingParams
from app.errors import ContextLengthExceeded, EngineFailed, NumericalError, Overloaded
from app.manifest import Defaults
from tests.api_harness import NUM_VIRTUAL_TOKENS, Harness, events

TEMPLATE = "{input}\nSentiment:"


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness.create(tmp_path / "prompts")


@pytest.fixture
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


def generate(client: TestClient, **body: Any) -> dict[str, Any]:
    reply = client.post("/v1/generate", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def stream(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    reply = client.post("/v1/generate", json={**body, "stream": True})
    assert reply.status_code == 200, reply.text
    return events(reply.text)


def joined(found: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(event["text"] for event in found if event.get("index") == index)


def test_answer_of_a_task(harness: Harness, client: TestClient) -> None:
    version = harness.publish("sentiment", template=TEMPLATE).version
    reply = client.post("/v1/generate", json={"task": "sentiment", "input": "good"})
    body = reply.json()
    prompt = harness.tokens("good\nSentiment:")
    assert reply.headers["X-Prompt-Version"] == "sentiment:1"
    assert reply.headers["X-Prompt-Digest"] == version.digest == body["digest"]
    assert (body["task"], body["version"]) == ("sentiment", 1)
    assert body["outputs"] == [{"index": 0, "text": "positive review", "finish_reason": "stop"}]
    generated = len(harness.engine.answer)
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": generated,
        "total_tokens": len(prompt) + generated,
        "prompt_tokens_details": {"soft_prompt_tokens": NUM_VIRTUAL_TOKENS, "cached_tokens": 0},
    }
    [call] = harness.engine.calls
    assert call.token_ids == prompt
    assert call.prompt is not None and call.prompt.digest == version.digest
    assert call.releases == 1 and harness.num_pins == 0


@pytest.mark.parametrize("task", [{}, {"task": None}, {"task": "tiny-llama"}], ids=["absent", "null", "base id"])
def test_bare_base(harness: Harness, client: TestClient, task: dict[str, Any]) -> None:
    harness.publish("sentiment")
    reply = client.post("/v1/generate", json={**task, "input": "good"})
    assert [reply.json()[key] for key in ("task", "version", "digest")] == [None] * 3
    assert "X-Prompt-Version" not in reply.headers and "X-Prompt-Digest" not in reply.headers
    assert harness.engine.calls[0].prompt is None
    assert reply.json()["usage"]["prompt_tokens_details"]["soft_prompt_tokens"] == 0
    # No template, so no separator to take off.
    assert reply.json()["outputs"][0]["text"] == " positive review"


@pytest.mark.parametrize("reference", ["sentiment", "sentiment:1", "sentiment@latest", "digest"])
def test_references(harness: Harness, client: TestClient, reference: str) -> None:
    version = harness.publish("sentiment").version
    named = f"sentiment@{version.digest}" if reference == "digest" else reference
    assert generate(client, task=named, input="x")["version"] == 1


@pytest.mark.parametrize(
    "reference", ["nope", "sentiment:2", "sentiment@prod", "", "Sentiment", "../x", "sentiment:01", "a\0", "é" * 99]
)
def test_unknown_and_malformed_references_look_the_same(harness: Harness, client: TestClient, reference: str) -> None:
    harness.publish("sentiment")
    reply = client.post("/v1/generate", json={"task": reference, "input": "x"})
    assert reply.status_code == 404
    assert reply.json()["error"] == {
        "message": "there is no such task, version, alias or file",
        "type": "invalid_request_error",
        "param": None,
        "code": "not_found",
    }
    assert not harness.engine.calls, "it must never fall back to the base model"


def test_request_over_version_over_ours(harness: Harness, client: TestClient) -> None:
    harness.publish("bare", 0.1)
    harness.publish("tuned", 0.2, defaults=Defaults(max_tokens=5, temperature=0.5, top_p=0.8, top_k=3))
    eos = harness.base.eos_token_ids
    asked = {"max_tokens": 7, "temperature": 0.9, "top_p": 0.4, "top_k": 9, "seed": -5}
    expected = {
        ("bare", False): SamplingParams(max_tokens=128, temperature=0.0, stop_token_ids=eos),
        ("tuned", False): SamplingParams(max_tokens=5, temperature=0.5, top_p=0.8, top_k=3, stop_token_ids=eos),
        ("tuned", True): SamplingParams(max_tokens=7, temperature=0.9, top_p=0.4, top_k=9, seed=-5, stop_token_ids=eos),
    }
    for (task, ask), params in expected.items():
        generate(client, task=task, input="x", **(asked if ask else {}))
        assert harness.engine.calls[-1].params == params
    generate(client, task="tuned", input="x", temperature=0.0, top_k=0)
    assert harness.engine.calls[-1].params == SamplingParams(
        max_tokens=5, temperature=0.0, top_p=0.8, top_k=0, stop_token_ids=eos
    )


def test_raw_means_no_template_and_no_defaults(harness: Harness, client: TestClient) -> None:
    harness.publish("tuned", template=TEMPLATE, defaults=Defaults(max_tokens=2, stop=["pos"]))
    output = generate(client, task="tuned", input="good", raw=True)["outputs"][0]
    assert harness.engine.calls[0].token_ids == harness.tokens("good")
    assert output == {"index": 0, "text": " positive review", "finish_reason": "stop"}


def test_default_max_tokens_gives_way_to_the_context(harness: Harness, client: TestClient) -> None:
    harness.publish("sentiment")
    text = "x" * 450
    generate(client, task="sentiment", input=text)
    room = harness.base.info.max_model_len - NUM_VIRTUAL_TOKENS - len(harness.tokens(text))
    assert harness.engine.calls[0].params.max_tokens == room < 128
    generate(client, task="sentiment", input=text, max_tokens=127)
    assert harness.engine.calls[1].params.max_tokens == 127, "what was asked for is the engine's to refuse"


def test_length(harness: Harness, client: TestClient) -> None:
    body = generate(client, input="x", max_tokens=3)
    assert body["outputs"][0] == {
        "index": 0,
        "text": harness.base.tokenizer.decode(harness.engine.answer[:3]),
        "finish_reason": "length",
    }
    assert body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("answer", "stop", "text"),
    [
        (" positive review", "review", "positive "),
        (" positive review", "positive", ""),
        (" positive review", "p", ""),
        (" positive review", " rev", "positive"),
        (" positive review", ["zzz", "view", "tive"], "posi"),
        (" positive review", [], "positive review"),
        (" positive review", "reviews", "positive review"),
        # The separator is not part of the answer, so this cannot stop at it.
        (" positive review", " ", "positive"),
        ("\nreview", "\n", ""),
        (" 5 € café", "é", "5 € caf"),
        ("  two", "two", " "),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_stop_strings(harness: Harness, client: TestClient, answer: str, stop: Any, text: str, streamed: bool) -> None:
    harness.publish("sentiment", template=TEMPLATE)
    harness.answer(answer)
    body = {"task": "sentiment", "input": "good", "stop": stop}
    if streamed:
        found = stream(client, **body)
        assert joined(found) == text
        assert [event["finish_reason"] for event in found[:-1]] == [None] * (len(found) - 2) + ["stop"]
    else:
        assert generate(client, **body)["outputs"] == [{"index": 0, "text": text, "finish_reason": "stop"}]
    [call] = harness.engine.calls
    assert call.releases == 1
    if text != answer.strip():
        assert call.closed, "the engine must not go on behind a stop string"


def test_stop_string_of_the_version(harness: Harness, client: TestClient) -> None:
    harness.publish("sentiment", defaults=Defaults(stop=["review"]))
    assert generate(client, task="sentiment", input="x")["outputs"][0]["text"] == " positive "
    assert generate(client, task="sentiment", input="x", stop=[])["outputs"][0]["text"] == " positive review"


@pytest.mark.parametrize("answer", [" yes", "yes", "  two spaces ", " ", "", "\n 1", " 😀 né€ 😀", "a\u2028b"])
@pytest.mark.parametrize("template", [None, TEMPLATE, "{input}\n"])
def test_stream_makes_the_same_text(harness: Harness, client: TestClient, answer: str, template: str | None) -> None:
    harness.publish("task", template=template)
    harness.answer(answer)
    plain = generate(client, task="task", input=["a", "b"])
    found = stream(client, task="task", input=["a", "b"])
    for index in (0, 1):
        assert joined(found, index) == plain["outputs"][index]["text"]
    assert found[-1]["usage"] == plain["usage"]


def test_stream_of_several_inputs(harness: Harness, client: TestClient) -> None:
    version = harness.publish("sentiment", template=TEMPLATE).version
    reply = client.post(
        "/v1/generate", json={"task": "sentiment", "input": ["a", "b", "c"], "stream": True, "max_tokens": 4}
    )
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache" and reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["X-Prompt-Version"] == "sentiment:1"
    assert reply.text.isascii()
    *pieces, last = events(reply.text)
    assert {event["id"] for event in [*pieces, last]} == {last["id"]}
    assert pieces[0]["digest"] == last["digest"] == version.digest, "said first and last"
    assert set(pieces[1]) == {"id", "index", "input_index", "text", "finish_reason"}
    assert set(last) == {"id", "task", "version", "digest", "system_fingerprint", "usage"}
    fingerprint = f"fp_{harness.base.info.fingerprint[7:19]}_{version.digest[7:19]}"
    assert pieces[0]["system_fingerprint"] == last["system_fingerprint"] == fingerprint
    for index in range(3):
        own = [event["finish_reason"] for event in pieces if event["index"] == index]
        assert own[-1] == "length" and set(own[:-1]) == {None}
    assert last["usage"]["completion_tokens"] == 12
    assert last["usage"]["prompt_tokens_details"]["soft_prompt_tokens"] == 3 * NUM_VIRTUAL_TOKENS
    assert harness.num_pins == 0 and [call.releases for call in harness.engine.calls] == [1, 1, 1]


def test_one_version_answers_all_inputs(harness: Harness, client: TestClient) -> None:
    """However often the alias moves: the reference is resolved once."""
    harness.publish("sentiment", 0.1)
    pin, count = harness.registry.pin, iter(range(9))

    def pin_and_publish(reference: str, **user: Any) -> Any:
        found = pin(reference, **user)
        harness.publish("sentiment", 0.2 + next(count))
        return found

    harness.registry.pin = pin_and_publish  # type: ignore[method-assign]
    assert generate(client, task="sentiment", input=["a", "b"])["version"] == 1
    assert len({call.prompt.digest for call in harness.engine.calls}) == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_refused_at_the_door(harness: Harness, client: TestClient, streamed: bool) -> None:
    """The third of four inputs finds no room: an error status, and the two before it are closed."""
    harness.publish("sentiment")
    harness.engine.refuse = (2, Overloaded("no room"))
    reply = client.post("/v1/generate", json={"task": "sentiment", "input": ["a", "b", "c", "d"], "stream": streamed})
    assert reply.status_code == 503 and reply.headers["Retry-After"] == "1"
    assert reply.json()["error"]["code"] == "overloaded" and reply.json()["error"]["type"] == "server_error"
    assert [call.closed for call in harness.engine.calls] == [True, True]
    assert [call.releases for call in harness.engine.calls] == [1, 1]
    assert harness.num_pins == 0


def test_too_long(harness: Harness, client: TestClient) -> None:
    harness.publish("sentiment")
    harness.engine.refuse = (0, ContextLengthExceeded("4 + 600 + 128 make 732; the limit is 512", param="input"))
    reply = client.post("/v1/generate", json={"task": "sentiment", "input": "x"})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert reply.json()["error"]["param"] == "input"
    assert harness.num_pins == 0


@pytest.mark.parametrize("streamed", [False, True])
def test_outputs_of_a_list_say_which_input_is_theirs(harness: Harness, client: TestClient, streamed: bool) -> None:
    """Also where each has several answers, which come as they are made."""
    harness.publish("sentiment")
    body = {"task": "sentiment", "input": ["a", "b", "c"], "n": 2}
    if streamed:
        found = [event for event in stream(client, **body) if "index" in event]
    else:
        found = generate(client, **body)["outputs"]
        assert [output["index"] for output in found] == list(range(6))
    places = {(output["index"], output["input_index"]) for output in found}
    assert places == {(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)}
    texts = [call.token_ids for call in harness.engine.calls]
    assert texts == [harness.tokens(text) for text in "aabbcc"]


def test_a_list_of_one_is_a_list(client: TestClient) -> None:
    assert generate(client, input=["a"])["outputs"][0]["input_index"] == 0
    assert "input_index" not in generate(client, input="a")["outputs"][0]


@pytest.mark.parametrize(("inputs", "param"), [([], "input"), (["x"] * 257, "input"), (["x", 3], "input")])
def test_lists_that_are_refused_whole(harness: Harness, client: TestClient, inputs: list[Any], param: str) -> None:
    reply = client.post("/v1/generate", json={"input": inputs})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param
    assert not harness.engine.calls


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("n", "calls", "number"), [(1, 2, 2), (2, 2, 1), (3, 2, 0)])
def test_one_that_is_too_long_is_named_and_no_other_is_answered(
    harness: Harness, client: TestClient, streamed: bool, n: int, calls: int, number: int
) -> None:
    harness.publish("sentiment")
    harness.engine.refuse = (calls, ContextLengthExceeded("too long", param="input"))
    body = {"task": "sentiment", "input": ["a", "b", "c"], "n": n, "stream": streamed}
    reply = client.post("/v1/generate", json=body)
    error = reply.json()["error"]
    assert reply.status_code == 400 and (error["param"], error["code"]) == ("input", "context_length_exceeded")
    assert error["message"] == f"input[{number}]: too long"
    assert [(call.closed, call.releases) for call in harness.engine.calls] == [(True, 1)] * calls
    assert harness.num_pins == 0


def test_failure_of_a_plain_reply(harness: Harness, client: TestClient) -> None:
    harness.publish("sentiment")
    harness.engine.fail_after = (2, NumericalError("logits are not finite"))
    reply = client.post("/v1/generate", json={"task": "sentiment", "input": ["a", "b"]})
    assert reply.status_code == 500 and reply.json()["error"]["code"] == "numerical_error"
    assert [call.releases for call in harness.engine.calls] == [1, 1] and harness.num_pins == 0


@pytest.mark.parametrize("failure", [EngineFailed("the engine stopped"), ZeroDivisionError("secret")])
def test_failure_in_a_stream(harness: Harness, client: TestClient, failure: Exception) -> None:
    harness.publish("sentiment")
    harness.engine.fail_after = (2, failure)
    *pieces, last = stream(client, task="sentiment", input=["a", "b"])
    assert pieces and set(last) == {"error"}
    known = isinstance(failure, EngineFailed)
    assert last["error"]["code"] == ("engine_failed" if known else "internal_error")
    assert last["error"]["type"] == "server_error" and "secret" not in str(last)
    assert [call.releases for call in harness.engine.calls] == [1, 1] and harness.num_pins == 0


def test_generation_that_ends_without_a_reason(harness: Harness, client: TestClient) -> None:
    async def closed(_: Any) -> Any:
        raise StopAsyncIteration

    original = harness.engine.generate

    def generate_nothing(*args: Any, **kwargs: Any) -> Any:
        generation = original(*args, **kwargs)
        generation.__class__ = type("Silent", (type(generation),), {"__anext__": closed})
        return generation

    harness.engine.generate = generate_nothing  # type: ignore[method-assign]
    reply = client.post("/v1/generate", json={"input": "x"})
    assert reply.status_code == 500 and reply.json()["error"]["code"] == "engine_failed"
    assert harness.engine.calls[0].releases == 1
