"""POST /v1/chat/completions, /tokenize and /detokenize over the fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.api.openai.replies import ChatReply, TokenizeReply
from app.engine import SamplingParams
from app.errors import EngineFailed
from tests.api_harness import NUM_VIRTUAL_TOKENS, Harness, events
from tests.tiny import CHAT_TEMPLATE

URL = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}]
TEXT = "system: Be short.\nuser: hello\nassistant:"


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Harness:
    harness = Harness.create(tmp_path / "prompts")
    monkeypatch.setattr(harness.base.tokenizer, "chat_template", CHAT_TEMPLATE)
    return harness


@pytest.fixture
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


def chat(client: TestClient, **body: Any) -> dict[str, Any]:
    reply = client.post(URL, json={"model": "tiny-llama", "messages": MESSAGES, **body})
    assert reply.status_code == 200, reply.text
    assert ChatReply.model_validate_json(reply.content, extra="forbid")
    found: dict[str, Any] = reply.json()
    return found


def stream(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    reply = client.post(URL, json={"model": "tiny-llama", "messages": MESSAGES, **body, "stream": True})
    assert reply.status_code == 200, reply.text
    return events(reply.text)


def refused(client: TestClient, path: str = URL, **body: Any) -> Any:
    given = {"model": "tiny-llama", "messages": MESSAGES} if path == URL else {}
    reply = client.post(path, json={**given, **body})
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]["param"]


def test_the_base_s_chat_template_behind_the_soft_prompt(harness: Harness, client: TestClient) -> None:
    version = harness.publish("sentiment", template="{input}\nSentiment:").version
    reply = client.post(URL, json={"model": "sentiment", "messages": MESSAGES})
    body = reply.json()
    assert reply.headers["X-Prompt-Version"] == "sentiment:1"
    assert reply.headers["X-Prompt-Digest"] == version.digest
    assert body.pop("id").startswith("chatcmpl-") and body.pop("created") > 1_700_000_000
    count, generated = len(harness.tokens(TEXT)), len(harness.engine.answer)
    assert body == {
        "object": "chat.completion",
        "model": "sentiment",
        "system_fingerprint": f"fp_{harness.base.info.fingerprint[7:19]}_{version.digest[7:19]}",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": " positive review", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": count,
            "completion_tokens": generated,
            "total_tokens": count + generated,
            "prompt_tokens_details": {"soft_prompt_tokens": NUM_VIRTUAL_TOKENS, "cached_tokens": 0},
        },
    }
    [call] = harness.engine.calls
    assert call.token_ids == harness.tokens(TEXT) and call.releases == 1 and harness.num_pins == 0
    room = 512 - NUM_VIRTUAL_TOKENS - count
    assert call.params == SamplingParams(max_tokens=room, temperature=1.0, stop_token_ids=harness.base.eos_token_ids)


def test_both_names_of_max_tokens(harness: Harness, client: TestClient) -> None:
    for body, expected in (
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 4),
    ):
        found = chat(client, **body)
        assert harness.engine.calls[-1].params.max_tokens == expected
        assert found["choices"][0]["finish_reason"] == "length" and found["usage"]["completion_tokens"] == expected
    assert refused(client, max_tokens=0) == "max_tokens"
    assert refused(client, max_completion_tokens=0) == "max_completion_tokens"


def test_messages(harness: Harness, client: TestClient) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    returned: dict[str, Any] = {
        "role": "assistant",
        "content": "ok",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
    }
    chat(client, messages=[{"role": "developer", "content": "d"}, {"role": "user", "content": parts}, returned])
    assert harness.engine.calls[-1].token_ids == harness.tokens("system: d\nuser: a\nb\nassistant: ok\nassistant:")


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hello",
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
        [{"content": "x"}],
        [{"role": "user", "content": "x"}] * 1001,
    ],
)
def test_what_are_no_messages(client: TestClient, messages: Any) -> None:
    assert refused(client, messages=messages) == "messages"


def test_templates_that_refuse(harness: Harness, client: TestClient) -> None:
    harness.base.tokenizer.chat_template = "{{ raise_exception('roles must alternate, ' + messages[0].content) }}"
    reply = client.post(URL, json={"model": "tiny-llama", "messages": [{"role": "user", "content": "M8412X"}]})
    assert reply.status_code == 400 and "M8412X" not in reply.text
    assert reply.json()["error"]["param"] == "messages"
    harness.base.tokenizer.chat_template = None
    assert refused(client) == "model"
    assert not harness.engine.calls and harness.num_pins == 0


def test_logprobs(harness: Harness, client: TestClient) -> None:
    harness.answer("xé")
    [choice] = chat(client, logprobs=True, top_logprobs=2)["choices"]
    other = str(harness.base.tokenizer.decode([5]))
    found = choice["logprobs"]["content"]
    assert [entry["token"] for entry in found] == ["x", "�", "�"]
    assert [entry["bytes"] for entry in found] == [[120], None, None]
    assert found[0]["top_logprobs"] == [
        {"token": "x", "logprob": -0.5, "bytes": [120]},
        {"token": other, "logprob": -1.5, "bytes": list(other.encode())},
    ]
    assert choice["logprobs"]["refusal"] is None
    chat(client, logprobs=True)
    assert [call.params.logprobs for call in harness.engine.calls] == [2, 0]
    streamed = [event["choices"][0]["logprobs"] for event in stream(client, logprobs=True, top_logprobs=2)]
    assert [entry for part in streamed if part for entry in part["content"]] == found
    assert refused(client, top_logprobs=2) == "top_logprobs"
    assert refused(client, logprobs=True, top_logprobs=21) == "top_logprobs"
    assert refused(client, logprobs=2) == "logprobs"


def test_stream(harness: Harness, client: TestClient) -> None:
    harness.publish("sentiment")
    options = {"model": "sentiment", "n": 2, "stream_options": {"include_usage": True}}
    *chunks, last = stream(client, **options)
    assert {event["id"] for event in chunks} == {last["id"]} and last["id"].startswith("chatcmpl-")
    assert {event["object"] for event in [*chunks, last]} == {"chat.completion.chunk"}
    assert all(event["usage"] is None for event in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 2 * len(harness.engine.answer)
    assert last["usage"]["prompt_tokens_details"]["soft_prompt_tokens"] == NUM_VIRTUAL_TOKENS
    for index in (0, 1):
        begin, *middle, end = [event["choices"][0] for event in chunks if event["choices"][0]["index"] == index]
        assert begin["delta"] == {"role": "assistant", "content": ""}
        assert all(set(choice["delta"]) == {"content"} for choice in middle)
        assert "".join(choice["delta"]["content"] for choice in middle) == " positive review"
        assert [choice["finish_reason"] for choice in (begin, *middle)] == [None] * (len(middle) + 1)
        assert end["delta"] == {} and end["finish_reason"] == "stop"
    assert harness.num_pins == 0


def test_the_last_token_s_text_comes_before_the_finish_reason(harness: Harness, client: TestClient) -> None:
    *_, text, end = (event["choices"][0] for event in stream(client, max_tokens=3))
    assert text["delta"]["content"] == harness.base.tokenizer.decode(harness.engine.answer[2]) and not end["delta"]
    assert (text["finish_reason"], end["finish_reason"]) == (None, "length")


def test_a_stream_of_nothing(harness: Harness, client: TestClient) -> None:
    harness.engine.answer = []
    begin, end = (event["choices"][0] for event in stream(client))
    assert begin["delta"]["role"] == "assistant" and (end["delta"], end["finish_reason"]) == ({}, "stop")


def test_failure_in_a_stream(harness: Harness, client: TestClient) -> None:
    harness.engine.fail_after = (2, EngineFailed("the engine stopped"))
    *chunks, last = stream(client)
    assert chunks and set(last) == {"error"} and last["error"]["code"] == "engine_failed"
    assert harness.engine.calls[0].releases == 1


def test_token_ids(harness: Harness, client: TestClient) -> None:
    found = chat(client, return_token_ids=True)
    assert found["prompt_token_ids"] == harness.tokens(TEXT)
    assert found["choices"][0]["token_ids"] == harness.engine.answer
    chunks = stream(client, return_token_ids=True)
    assert chunks[0]["prompt_token_ids"] == harness.tokens(TEXT)
    ids = [token_id for event in chunks for token_id in event["choices"][0].get("token_ids", [])]
    assert ids == harness.engine.answer


@pytest.mark.parametrize(
    ("field", "value", "neutral"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}], []),
        ("tool_choice", "required", "none"),
        ("functions", [{"name": "f"}], None),
        ("modalities", ["text", "audio"], ["text"]),
        ("audio", {"voice": "x"}, None),
        ("chat_template", "{{ messages }}", None),
        ("add_generation_prompt", False, True),
        ("prompt_logprobs", 0, None),
        ("guided_json", {}, None),
        ("length_penalty", True, 1),
        ("echo", True, False),
        ("best_of", 2, 1),
        ("web_search_options", {"a": 1}, {}),
    ],
)
def test_a_field_that_would_matter_is_refused(client: TestClient, field: str, value: Any, neutral: Any) -> None:
    assert refused(client, **{field: value}) == field
    reply = client.post(URL, json={"model": "tiny-llama", "messages": MESSAGES, field: neutral})
    assert reply.status_code == 200 and reply.headers["X-Ignored-Fields"] == field


def test_tokenize(harness: Harness, client: TestClient) -> None:
    harness.publish("sentiment")
    reply = client.post("/tokenize", json={"model": "sentiment", "prompt": "the é", "return_token_strs": True})
    tokens = harness.tokens("the é")
    assert TokenizeReply.model_validate_json(reply.content, extra="forbid")
    strings = harness.base.tokenizer.convert_ids_to_tokens(tokens)
    assert reply.json() == {"count": len(tokens), "max_model_len": 512, "tokens": tokens, "token_strs": strings}
    reply = client.post("/tokenize", json={"messages": MESSAGES})
    assert reply.json()["tokens"] == harness.tokens(TEXT) and reply.json()["token_strs"] is None
    reply = client.post("/tokenize", json={"messages": MESSAGES, "add_generation_prompt": False})
    assert reply.json()["tokens"] == harness.tokens(TEXT.removesuffix("assistant:"))
    assert client.post("/tokenize", json={"prompt": ""}).json()["count"] == 0
    assert not harness.engine.calls


def test_detokenize(harness: Harness, client: TestClient) -> None:
    reply = client.post("/detokenize", json={"tokens": [0, *harness.tokens("the é"), 0]})
    assert reply.json() == {"prompt": "<|end|>the é<|end|>"}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    for tokens in ([128], [-1], ["1"], [True], None):
        assert refused(client, "/detokenize", tokens=tokens) == "tokens"


def test_tokenize_refuses(client: TestClient) -> None:
    assert refused(client, "/tokenize") == "prompt"
    assert refused(client, "/tokenize", prompt="x", messages=MESSAGES) == "prompt"
    assert refused(client, "/tokenize", prompt=["x"]) == "prompt"
    assert refused(client, "/tokenize", prompt="x", colour=1) == "colour"
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        for model in ("nope", "Sentiment", ""):
            assert client.post(path, json={**body, "model": model}).status_code == 404
