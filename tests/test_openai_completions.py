"""POST /v1/completions over the fake engine: every field, the order of a stream, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.api.openai.replies import CompletionReply
from app.engine import SamplingParams
from app.errors import ContextLengthExceeded, Overloaded
from app.manifest import Defaults
from tests.api_harness import NUM_VIRTUAL_TOKENS, Harness, events
from tests.fake_engine import FakeEngine

URL = "/v1/completions"


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness.create(tmp_path / "prompts")


@pytest.fixture
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    reply = client.post(URL, json={"model": "tiny-llama", "prompt": "good", **body})
    assert reply.status_code == 200, reply.text
    assert CompletionReply.model_validate_json(reply.content, extra="forbid")
    found: dict[str, Any] = reply.json()
    return found


def stream(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    reply = client.post(URL, json={"model": "tiny-llama", "prompt": "good", **body, "stream": True})
    assert reply.status_code == 200, reply.text
    return events(reply.text)


def refused(client: TestClient, **body: Any) -> dict[str, Any]:
    reply = client.post(URL, json={"model": "tiny-llama", "prompt": "good", **body})
    assert reply.status_code == 400, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def test_a_version_s_template_and_defaults_are_for_generate(harness: Harness, client: TestClient) -> None:
    defaults = Defaults(max_tokens=3, temperature=0.0, stop=["review"])
    version = harness.publish("sentiment", template="{input}\nSentiment:", defaults=defaults).version
    reply = client.post(URL, json={"model": "sentiment", "prompt": "good", "max_tokens": 40})
    body = reply.json()
    assert reply.headers["X-Prompt-Version"] == "sentiment:1"
    assert reply.headers["X-Prompt-Digest"] == version.digest
    assert "X-Ignored-Fields" not in reply.headers
    assert body.pop("id").startswith("cmpl-") and body.pop("created") > 1_700_000_000
    count, generated = len(harness.tokens("good")), len(harness.engine.answer)
    assert body == {
        "object": "text_completion",
        "model": "sentiment",
        "system_fingerprint": f"fp_{harness.base.info.fingerprint[7:19]}_{version.digest[7:19]}",
        "choices": [{"index": 0, "text": " positive review", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": count,
            "completion_tokens": generated,
            "total_tokens": count + generated,
            "prompt_tokens_details": {"soft_prompt_tokens": NUM_VIRTUAL_TOKENS, "cached_tokens": 0},
        },
    }
    [call] = harness.engine.calls
    assert call.token_ids == harness.tokens("good") and call.prompt is not None
    assert call.params == SamplingParams(max_tokens=40, temperature=1.0, stop_token_ids=harness.base.eos_token_ids)
    assert call.releases == 1 and harness.num_pins == 0


def test_defaults_are_openai_s(harness: Harness, client: TestClient) -> None:
    complete(client)
    expected = SamplingParams(max_tokens=16, temperature=1.0, stop_token_ids=harness.base.eos_token_ids)
    nulls = ("temperature", "top_p", "n", "stop", "logit_bias", "seed", "suffix", "user", "stream", "logprobs", "echo")
    complete(client, **dict.fromkeys(nulls))
    assert [call.params for call in harness.engine.calls] == [expected] * 2
    assert harness.engine.calls[0].prompt is None


def test_every_parameter_reaches_the_engine(harness: Harness, client: TestClient) -> None:
    asked: dict[str, Any] = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "logprobs": 3,
    }
    other = {"top_k": 7, "logit_bias": {"5": -100}, "seed": 3, "stop_token_ids": [9], "ignore_eos": True}
    complete(client, **asked, **other, cache_salt="s", user="u", metadata={"a": "b"})
    [call] = harness.engine.calls
    assert call.params == SamplingParams(
        **asked, top_k=7, logit_bias={5: -100.0}, seed=3, stop_token_ids=frozenset({9})
    )
    assert call.salt.endswith("s")
    complete(client, top_k=-1)
    assert harness.engine.calls[-1].params.top_k == 0


def test_kinds_of_prompts(harness: Harness, client: TestClient) -> None:
    ids = harness.tokens("good")
    for prompt, expected in (
        ("good", [ids]),
        (["good", "x"], [ids, harness.tokens("x")]),
        (ids, [ids]),
        ([ids, [7]], [ids, [7]]),
    ):
        harness.engine.calls.clear()
        found = complete(client, prompt=prompt)
        assert [call.token_ids for call in harness.engine.calls] == expected
        assert [choice["index"] for choice in found["choices"]] == list(range(len(expected)))
        assert found["usage"]["prompt_tokens"] == sum(map(len, expected))


@pytest.mark.parametrize(
    "prompt", [None, 5, [], [[]], [1, "a"], ["a", 1], [[1], 2], [[1], []], [-1], [True], [1.0], {}, ["a"] * 257]
)
def test_what_is_no_prompt(client: TestClient, prompt: Any) -> None:
    assert refused(client, prompt=prompt)["param"] == "prompt"


def test_samples(harness: Harness, client: TestClient) -> None:
    found = complete(client, prompt=["a", "b"], n=2, seed=5)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert [call.token_ids for call in harness.engine.calls] == [harness.tokens(text) for text in "aabb"]
    seeds = [call.params.seed for call in harness.engine.calls]
    assert seeds[0] == seeds[2] == 5 and seeds[1] == seeds[3] != 5
    assert found["usage"]["prompt_tokens"] == 2


def test_best_of_keeps_the_likeliest_by_token(harness: Harness, client: TestClient) -> None:
    engines = [FakeEngine(harness.tokens("abcd"[:count])) for count in (1, 2, 3, 4)]
    for engine, logprob in zip(engines, (-0.5, -0.1, -0.3, -0.9), strict=True):
        engine.logprob = logprob
    turns = iter(engines)
    harness.engine.generate = lambda *args, **kwargs: next(turns).generate(*args, **kwargs)  # type: ignore[method-assign]
    found = complete(client, n=2, best_of=4)
    assert [(choice["index"], choice["text"]) for choice in found["choices"]] == [(0, "ab"), (1, "abc")]
    assert [choice["logprobs"] for choice in found["choices"]] == [None, None]
    assert found["usage"]["completion_tokens"] == 1 + 2 + 3 + 4, "all are paid for"


def test_logprobs(harness: Harness, client: TestClient) -> None:
    harness.answer("é x")
    [choice] = complete(client, logprobs=2)["choices"]
    ids = harness.tokens("é x")
    tokens = [str(harness.base.tokenizer.decode([token_id])) for token_id in ids]
    other = harness.base.tokenizer.decode([5])
    assert choice["text"] == "é x" and tokens == ["�", "�", " ", "x"]
    assert choice["logprobs"]["tokens"] == tokens
    assert choice["logprobs"]["token_logprobs"] == [-0.5] * 4
    assert choice["logprobs"]["top_logprobs"] == [{token: -0.5, other: -1.5} for token in tokens]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2], "both bytes are at the character that they form"
    for max_tokens in (1, 3):
        [choice] = complete(client, logprobs=0, max_tokens=max_tokens)["choices"]
        assert len(choice["logprobs"]["tokens"]) == max_tokens


def test_echo(harness: Harness, client: TestClient) -> None:
    ids = harness.tokens("good")
    for prompt in ("good", ids):
        [choice] = complete(client, prompt=prompt, echo=True)["choices"]
        assert (choice["text"], choice["logprobs"]) == ("good positive review", None)
        [choice] = complete(client, prompt=prompt, echo=True, logprobs=0, max_tokens=2)["choices"]
        generated = harness.engine.answer[:2]
        logprobs = choice["logprobs"]
        tokens = [str(harness.base.tokenizer.decode([token_id])) for token_id in ids + generated]
        assert logprobs["tokens"] == tokens and choice["text"] == "".join(tokens)
        assert logprobs["token_logprobs"] == [None] + [-0.25] * (len(ids) - 1) + [-0.5] * 2
        assert logprobs["top_logprobs"][0] is None and len(logprobs["top_logprobs"]) == len(tokens)
        assert logprobs["text_offset"] == [len("".join(tokens[:i])) for i in range(len(tokens))]


def test_scoring_a_prompt(harness: Harness, client: TestClient) -> None:
    """As lm-evaluation-harness does it: nothing is generated."""
    harness.engine.answer = []
    found = complete(client, prompt=["good", "x y"], echo=True, logprobs=1, max_tokens=0)
    for choice, text in zip(found["choices"], ("good", "x y"), strict=True):
        assert choice["text"] == text
        assert choice["logprobs"]["token_logprobs"] == [None] + [-0.25] * (len(harness.tokens(text)) - 1)
    assert [call.params.max_tokens for call in harness.engine.calls] == [0, 0]
    assert [call.params.prompt_logprobs for call in harness.engine.calls] == [1, 1]
    assert found["usage"]["completion_tokens"] == 0
    assert complete(client, echo=True, max_tokens=0)["choices"][0]["text"] == "good"


def test_stop(harness: Harness, client: TestClient) -> None:
    [choice] = complete(client, stop=[" rev", "zzz"])["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" positive", "stop")
    assert harness.engine.calls[0].closed
    [choice] = complete(client, stop="iti", include_stop_str_in_output=True)["choices"]
    assert choice["text"] == " positi"
    assert refused(client, stop=list("abcde"))["param"] == "stop"
    assert refused(client, stop="")["param"] == "stop"


def test_token_ids_and_special_tokens(harness: Harness, client: TestClient) -> None:
    harness.engine.answer = [0, *harness.tokens("ok")]
    [choice] = complete(client, return_token_ids=True)["choices"]
    assert choice["prompt_token_ids"] == harness.tokens("good") and choice["token_ids"] == harness.engine.answer
    assert choice["text"] == "ok"
    assert complete(client, skip_special_tokens=False)["choices"][0]["text"] == "<|end|>ok"
    chunks = [event["choices"][0] for event in stream(client, return_token_ids=True)]
    assert chunks[0]["prompt_token_ids"] == harness.tokens("good")
    assert [token_id for chunk in chunks for token_id in chunk["token_ids"]] == harness.engine.answer


def test_truncation(harness: Harness, client: TestClient) -> None:
    [choice] = complete(client, prompt="a good x", truncate_prompt_tokens=3, echo=True, max_tokens=1)["choices"]
    assert harness.engine.calls[-1].token_ids == harness.tokens("a good x")[-3:]
    assert choice["text"].startswith("d x ")
    harness.publish("sentiment")
    complete(client, model="sentiment", prompt=[7] * 600, truncate_prompt_tokens=-1, max_tokens=8)
    assert len(harness.engine.calls[-1].token_ids) == 512 - NUM_VIRTUAL_TOKENS - 8
    assert refused(client, truncate_prompt_tokens=0)["param"] == "truncate_prompt_tokens"
    assert refused(client, truncate_prompt_tokens=-2)["param"] == "truncate_prompt_tokens"


def test_response_format(harness: Harness, client: TestClient) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}, "strict": True}}
    for wanted in ({"type": "text"}, {"type": "json_object"}, schema):
        complete(client, response_format=wanted)
    assert [call.constraint is not None for call in harness.engine.calls] == [False, True, True]
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    assert refused(client, response_format=wrong)["param"] == "response_format"
    assert refused(client, response_format={"type": "regex"})["param"] == "response_format"


def test_stream(harness: Harness, client: TestClient) -> None:
    version = harness.publish("sentiment").version
    body = {"model": "sentiment", "prompt": ["a", "b"], "stream": True, "stream_options": {"include_usage": True}}
    reply = client.post(URL, json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["X-Prompt-Version"] == "sentiment:1" and reply.headers["X-Prompt-Digest"] == version.digest
    *chunks, last = events(reply.text)
    assert len({json.dumps([event[name] for name in ("id", "created", "model", "object")]) for event in chunks}) == 1
    assert {event["id"] for event in chunks} == {last["id"]}
    assert all(event["usage"] is None for event in chunks)
    assert last["choices"] == [] and last["usage"]["prompt_tokens_details"]["soft_prompt_tokens"] == 8
    assert last["usage"]["completion_tokens"] == 2 * len(harness.engine.answer)
    for index in (0, 1):
        own = [event["choices"][0] for event in chunks if event["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == " positive review"
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
    assert "usage" not in str(stream(client)), "only who asks for it gets it"
    assert harness.num_pins == 0


def test_usage_so_far_in_every_chunk(client: TestClient) -> None:
    """guidellm asks for it, and counts tokens by it."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = stream(client, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    assert chunks[-1]["usage"] == last["usage"] and last["choices"] == []
    assert "usage" not in str(stream(client, stream_options={"continuous_usage_stats": True}))


def test_stream_of_an_echo_with_logprobs(client: TestClient) -> None:
    for body in ({}, {"max_tokens": 0}, {"stop": "rev"}, {"logprobs": None}, {"n": 2}):
        options = {"prompt": "a é", "echo": True, "logprobs": 1, "max_tokens": 9, **body}
        [*plain] = complete(client, **options)["choices"]
        found = [event["choices"][0] for event in stream(client, **options)]
        for index, choice in enumerate(plain):
            own = [chunk for chunk in found if chunk["index"] == index]
            assert "".join(chunk["text"] for chunk in own) == choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                assert [value for chunk in own for value in chunk["logprobs"][name]] == values, name


def test_ignored_fields_are_named(client: TestClient) -> None:
    body = {"model": "tiny-llama", "prompt": "x", "store": True, "suffix": None, "colour": "red"}
    for streamed in (False, True):
        reply = client.post(URL, json={**body, "stream": streamed})
        assert reply.status_code == 200
        assert reply.headers["X-Ignored-Fields"] == "store, suffix, colour"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "x"),
        ("tools", [{}]),
        ("guided_json", {"type": "object"}),
        ("prompt_logprobs", 1),
        ("raw", True),
        ("task", "x"),
        ("use_beam_search", True),
        ("length_penalty", True),
        ("temprature", 0),
        ("max_token", 5),
    ],
)
def test_a_field_that_would_matter_is_refused(client: TestClient, field: str, value: Any) -> None:
    assert refused(client, **{field: value})["param"] == field


def test_names_that_are_none(client: TestClient) -> None:
    for name in ("a\r\nX-Evil: 1", "é", "", "__class__", "x" * 65):
        reply = client.post(URL, json={"model": "tiny-llama", "prompt": "x", name: 1})
        assert reply.status_code == 400 and "Evil" not in reply.text
    assert refused(client, **{f"x{i}": 1 for i in range(33)})["param"] is None


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": -1}),
        ("n", {"max_tokens": 0, "echo": True, "n": 2}),
        ("n", {"n": 0}),
        ("n", {"n": 200, "prompt": ["a", "b"]}),
        ("best_of", {"n": 3, "best_of": 2}),
        ("best_of", {"best_of": 2, "stream": True}),
        ("logprobs", {"logprobs": 6}),
        ("logprobs", {"logprobs": True}),
        ("logprobs", {"logprobs": 5, "max_tokens": 100_000}),
        ("stream_options", {"stream_options": {}}),
        ("stop_token_ids", {"stop_token_ids": [128]}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
        ("min_tokens", {"min_tokens": 5, "max_tokens": 4}),
        ("temperature", {"temperature": "1"}),
        ("metadata", {"metadata": {"a": 1}}),
    ],
)
def test_refused(client: TestClient, param: str, body: dict[str, Any]) -> None:
    error = refused(client, **body)
    assert error["param"] == param
    assert error["message"].startswith((param, "min_tokens is 5"))


def test_errors_speak_of_the_prompt(harness: Harness, client: TestClient) -> None:
    harness.engine.refuse = (0, ContextLengthExceeded("too long", param="input"))
    error = refused(client)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    harness.engine.refuse = (0, ContextLengthExceeded("too long", param="input"))
    assert refused(client, prompt=["a", "b"])["message"] == "prompt[0]: too long"
    harness.engine.refuse = (1, Overloaded("no room"))
    reply = client.post(URL, json={"model": "tiny-llama", "prompt": ["a", "b"], "stream": True})
    assert reply.status_code == 503 and reply.headers["Retry-After"] == "1"
    assert [call.closed for call in harness.engine.calls] == [True] and harness.num_pins == 0
    reply = client.post(URL, json={"model": "nope", "prompt": "x"})
    assert reply.status_code == 404 and reply.json()["error"]["code"] == "not_found"
