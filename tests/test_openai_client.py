"""The openai package as it is, against a server that listens: sync, async, streams, raw replies, errors, retries."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from app.errors import EngineFailed, Overloaded
from tests.access_harness import KeyedHarness
from tests.api_harness import NUM_VIRTUAL_TOKENS, Harness, Listening
from tests.tiny import CHAT_TEMPLATE

ANSWER = " positive review"
MESSAGES: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    harness = Harness.create(tmp_path_factory.mktemp("client") / "prompts", answer=ANSWER)
    harness.publish("sentiment")
    return harness


@pytest.fixture(scope="module")
def server(harness: Harness) -> Iterator[Listening]:
    with pytest.MonkeyPatch.context() as patch, harness.listening() as server:
        patch.setattr(harness.base.tokenizer, "chat_template", CHAT_TEMPLATE)
        yield server


@pytest.fixture
def url(server: Listening, harness: Harness) -> Iterator[str]:
    yield f"http://127.0.0.1:{server.port}/v1"
    harness.engine.fail_after = harness.engine.refuse = None
    harness.engine.calls.clear()


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_completion(client: OpenAI) -> None:
    found = client.completions.create(model="sentiment:1", prompt=["good", "bad"], max_tokens=40, logprobs=1, seed=1)
    assert [choice.text for choice in found.choices] == [ANSWER, ANSWER]
    assert found.choices[0].finish_reason == "stop" and found.object == "text_completion"
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and set(logprobs.token_logprobs or ()) == {-0.5}
    assert "".join(logprobs.tokens or ()) == ANSWER
    assert found.usage is not None and found.usage.prompt_tokens_details is not None
    assert found.usage.prompt_tokens_details.cached_tokens == 0
    assert found.usage.to_dict()["prompt_tokens_details"] == {
        "soft_prompt_tokens": 2 * NUM_VIRTUAL_TOKENS,
        "cached_tokens": 0,
    }
    assert found.system_fingerprint is not None and found.system_fingerprint.startswith("fp_")


def test_chat(client: OpenAI) -> None:
    found = client.chat.completions.create(
        model="sentiment", messages=MESSAGES, n=2, logprobs=True, top_logprobs=1, max_completion_tokens=40
    )
    assert [choice.message.content for choice in found.choices] == [ANSWER] * 2
    assert found.choices[0].message.role == "assistant" and found.choices[0].finish_reason == "stop"
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == ANSWER
    assert bytes(value for entry in logprobs.content for value in entry.bytes or ()).decode() == ANSWER
    said: Any = found.choices[0].message
    again = client.chat.completions.create(model="sentiment", messages=[*MESSAGES, said, *MESSAGES])
    assert again.choices[0].message.content == ANSWER, "what was received can be sent back"


def test_structured_output(harness: Harness, client: OpenAI) -> None:
    schema: Any = {"name": "x", "strict": True, "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    client.chat.completions.create(
        model="sentiment", messages=MESSAGES, response_format={"type": "json_schema", "json_schema": schema}
    )
    assert harness.engine.calls[-1].constraint is not None


def test_streams(client: OpenAI) -> None:
    with client.completions.create(
        model="sentiment", prompt="x", max_tokens=40, stream=True, stream_options={"include_usage": True}
    ) as chunks:
        *pieces, last = chunks
    assert "".join(piece.choices[0].text for piece in pieces) == ANSWER
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens > 0
    assert len({piece.id for piece in [*pieces, last]}) == 1
    deltas = list(client.chat.completions.create(model="sentiment", messages=MESSAGES, stream=True))
    assert deltas[0].choices[0].delta.role == "assistant" and deltas[-1].choices[0].finish_reason == "stop"
    assert "".join(delta.choices[0].delta.content or "" for delta in deltas) == ANSWER


def test_the_client_s_own_accumulator(client: OpenAI) -> None:
    with client.chat.completions.stream(model="sentiment", messages=MESSAGES) as stream:
        kinds = [event.type for event in stream]
        found = stream.get_final_completion()
    assert "content.delta" in kinds and kinds[-1] == "content.done"
    assert found.choices[0].message.content == ANSWER and found.choices[0].finish_reason == "stop"


def test_vllm_s_extras(harness: Harness, client: OpenAI) -> None:
    extra = {"top_k": 3, "min_tokens": 1, "return_token_ids": True}
    found = client.completions.create(model="sentiment", prompt=[5, 6], extra_body=extra)
    assert harness.engine.calls[-1].params.top_k == 3
    assert found.choices[0].to_dict()["prompt_token_ids"] == [5, 6]


def test_raw_reply(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="sentiment", messages=MESSAGES, store=True)
    assert raw.headers["X-Prompt-Version"] == "sentiment:1" and raw.headers["X-Prompt-Digest"].startswith("sha256:")
    assert raw.headers["X-Ignored-Fields"] == "store" and raw.headers["X-Request-Id"]
    assert raw.parse().choices[0].message.content == ANSWER
    with client.completions.with_streaming_response.create(model="sentiment", prompt="x", stream=True) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: {") for line in lines[:-1])


def test_models(client: OpenAI) -> None:
    listed = list(client.models.list())
    assert [model.id for model in listed] == ["tiny-llama", "sentiment"]
    for reference in ("sentiment", "sentiment:1", "sentiment@latest"):
        found = client.models.retrieve(reference)
        assert found.id == reference and found.owned_by == "softprompt"
        assert found.to_dict()["parent"] == "tiny-llama" and found.to_dict()["version"] == 1


def test_async(url: str) -> None:
    async def main() -> None:
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            plain, chat, stream = await asyncio.gather(
                client.completions.create(model="sentiment", prompt="x"),
                client.chat.completions.create(model="sentiment", messages=MESSAGES),
                client.chat.completions.create(model="sentiment", messages=MESSAGES, stream=True),
            )
            assert plain.choices[0].text == chat.choices[0].message.content == ANSWER
            assert "".join([part.choices[0].delta.content or "" async for part in stream]) == ANSWER
            assert [model.id async for model in client.models.list()] == ["tiny-llama", "sentiment"]
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="nope", prompt="x")

    asyncio.run(main())


def test_errors(harness: Harness, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=MESSAGES)
    assert (missing.value.code, missing.value.type) == ("not_found", "invalid_request_error")
    assert missing.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope:3")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="sentiment", prompt="x", suffix="y")
    assert wrong.value.param == "suffix"
    with pytest.raises(openai.BadRequestError) as tools:
        function: Any = {"type": "function", "function": {"name": "f"}}
        client.chat.completions.create(model="sentiment", messages=MESSAGES, tools=[function])
    assert tools.value.param == "tools"
    harness.engine.fail_after = (0, EngineFailed("the engine stopped"))
    with pytest.raises(openai.InternalServerError) as failed:
        client.completions.create(model="sentiment", prompt="x")
    assert failed.value.code == "engine_failed"
    harness.engine.fail_after = (2, EngineFailed("the engine stopped"))
    with pytest.raises(openai.APIError, match="the engine stopped"):
        list(client.completions.create(model="sentiment", prompt="x", stream=True))


@pytest.mark.parametrize("streamed", [False, True])
def test_retries(harness: Harness, client: OpenAI, monkeypatch: pytest.MonkeyPatch, streamed: bool) -> None:
    """An overloaded server says when to come back, and the client does."""
    generate: Callable[..., Any] = harness.engine.generate
    refusals = iter([Overloaded("no room"), Overloaded("no room")])
    monkeypatch.setattr(Overloaded, "retry_after", 0)

    def busy_at_first(*args: Any, **kwargs: Any) -> Any:
        for error in refusals:
            raise error
        return generate(*args, **kwargs)

    monkeypatch.setattr(harness.engine, "generate", busy_at_first)
    with pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(model="sentiment", prompt="x")
    assert refused.value.status_code == 503 and refused.value.code == "overloaded"
    assert refused.value.response.headers["Retry-After"] == "0"
    found: Any = client.with_options(max_retries=1).completions.create(model="sentiment", prompt="x", stream=streamed)
    assert (list(found)[-1] if streamed else found).choices[0].finish_reason == "stop"
    assert harness.num_pins == 0


def test_keys(tmp_path: Path) -> None:
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    harness.publish("sentiment")
    keys = {
        scope: harness.key(scope)["Authorization"].removeprefix("Bearer ") for scope in ("generate", "prompts:read")
    }
    with harness.listening() as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        with OpenAI(base_url=url, api_key=keys["generate"], max_retries=0) as client:
            assert client.completions.create(model="sentiment", prompt="x").choices[0].text == ANSWER
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="sk-wrong").completions.create(model="sentiment", prompt="x")
            with pytest.raises(openai.PermissionDeniedError):
                client.with_options(api_key=keys["prompts:read"]).completions.create(model="sentiment", prompt="x")
