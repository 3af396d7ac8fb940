"""openai-python as it is; tests/test_openai_client.py has it against a server whose engine fails when told to."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from conftest import BASE, Server, rows
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

CLIENT = "openai"
ADDRESS = "901 Hamlet St, Evanston, IL 60202"
FIELDS = "number: 901 | street: Hamlet St | city: Evanston | state: IL | zip: 60202"
GREEDY: dict[str, Any] = {
    "model": "address_parse",
    "prompt": f"{ADDRESS}\nFields:",
    "max_tokens": 96,
    "temperature": 0,
    "stop": "\n",
}
MESSAGES: Any = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_completion(client: OpenAI) -> None:
    """completions.create"""
    found = client.completions.create(**GREEDY)
    assert found.choices[0].text.strip() == FIELDS and found.choices[0].finish_reason == "stop"
    assert found.usage is not None and found.usage.to_dict()["prompt_tokens_details"]["soft_prompt_tokens"] == 20


def test_completion_stream(client: OpenAI) -> None:
    """completions.create, stream with include_usage"""
    *pieces, last = client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True})
    whole = client.completions.create(**GREEDY)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert last.usage is not None and whole.usage is not None and last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_completion_parameters(client: OpenAI) -> None:
    """completions.create, every parameter"""
    found = client.completions.create(
        model="sentiment_mixed@latest",
        prompt=["I love it.\nSentiment:", "I hate it.\nSentiment:"],
        n=2,
        best_of=3,
        max_tokens=3,
        temperature=0.7,
        top_p=0.9,
        seed=5,
        logprobs=5,
        echo=True,
        stop=["\n"],
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={"50": -100},
        user="u",
        extra_body={"top_k": 20, "min_p": 0.01, "min_tokens": 1, "repetition_penalty": 1.05, "return_token_ids": True},
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    for choice in found.choices:
        assert choice.text.startswith("I ") and choice.logprobs is not None
        assert choice.logprobs.tokens and "".join(choice.logprobs.tokens).startswith(choice.text), "and what ended it"
    again = [client.completions.create(**GREEDY | {"temperature": 1, "seed": 3}).choices[0].text for _ in range(2)]
    assert again[0] == again[1], "the same seed, the same text"


def test_completion_token_ids(client: OpenAI) -> None:
    """completions.create, prompts as token ids; echo with max_tokens=0 scores them"""
    ids = client.completions.create(**GREEDY, extra_body={"return_token_ids": True}).choices[0].to_dict()
    found = client.completions.create(
        model="address_parse", prompt=[ids["prompt_token_ids"]] * 2, max_tokens=0, echo=True, logprobs=1
    )
    for choice in found.choices:
        assert choice.text == GREEDY["prompt"] and choice.logprobs is not None and choice.logprobs.token_logprobs
        first, *rest = choice.logprobs.token_logprobs
        assert first is None and all(math.isfinite(logprob) for logprob in rest)


def test_chat(client: OpenAI) -> None:
    """chat.completions.create, every parameter"""
    found = client.chat.completions.create(
        model=BASE,
        messages=[{"role": "developer", "content": "Be short."}, *MESSAGES],
        n=2,
        max_completion_tokens=8,
        temperature=0.5,
        top_p=0.9,
        seed=1,
        logprobs=True,
        top_logprobs=3,
        stop=["\n\n"],
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={"50": -100},
        metadata={"a": "b"},
        user="u",
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        reasoning_effort="low",
        response_format={"type": "text"},
    )
    assert len(found.choices) == 2
    for choice in found.choices:
        assert choice.message.role == "assistant" and choice.logprobs is not None and choice.logprobs.content
        assert "".join(entry.token for entry in choice.logprobs.content).startswith(choice.message.content or "")
        assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)


def test_chat_stream(client: OpenAI) -> None:
    """chat.completions.stream, the client's own accumulator"""
    asked: dict[str, Any] = {"model": BASE, "messages": MESSAGES, "max_completion_tokens": 40, "temperature": 0}
    asked["stop"] = [" "]  # at the length limit the client's accumulator raises LengthFinishReasonError
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        found = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    whole = client.chat.completions.create(**asked)
    assert found.choices[0].message.content == whole.choices[0].message.content
    assert found.usage is not None and whole.usage is not None
    assert found.usage.completion_tokens == whole.usage.completion_tokens


class Colour(BaseModel):
    name: Literal["red", "green"]  # nothing endless: a cut answer is LengthFinishReasonError
    warm: bool


def test_structured_output(client: OpenAI) -> None:
    """chat.completions.parse by a pydantic class; json_object"""
    asked: dict[str, Any] = {"model": BASE, "messages": MESSAGES, "max_completion_tokens": 400, "seed": 1}
    found = client.chat.completions.parse(**asked, response_format=Colour)
    assert isinstance(found.choices[0].message.parsed, Colour)
    kinds = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"enum": ["red", "green"]}}}
    reply = client.chat.completions.create(**asked, response_format=kinds)  # type: ignore[call-overload]
    assert json.loads(reply.choices[0].message.content) in ("red", "green")
    reply = client.chat.completions.create(**asked, response_format={"type": "json_object"}, temperature=0)
    assert reply.choices[0].message.content.startswith("{")


def test_async(server: Server) -> None:
    """AsyncOpenAI: plain, streams, many at once"""
    data = rows("sentiment_mixed", 8)

    async def main() -> None:
        async with AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:

            async def one(text: str) -> str:
                asked: dict[str, Any] = {"model": "sentiment_mixed", "prompt": f"{text}\nSentiment:", "temperature": 0}
                whole = await client.completions.create(**asked, max_tokens=2)
                stream = await client.completions.create(**asked, max_tokens=2, stream=True)
                assert "".join([piece.choices[0].text async for piece in stream]) == whole.choices[0].text
                return whole.choices[0].text.strip()

            said = await asyncio.gather(*[one(row["input"]) for row in data])
            right = sum(answer.startswith(row["target"]) for answer, row in zip(said, data, strict=True))
            assert right >= len(data) - 2
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="nope", messages=MESSAGES)

    asyncio.run(main())


def test_raw_response(client: OpenAI) -> None:
    """with_raw_response, with_streaming_response"""
    raw = client.completions.with_raw_response.create(**GREEDY, extra_body={"some_unknown_field": 1})
    assert raw.headers["X-Prompt-Version"] == "address_parse:1" and raw.headers["X-Request-Id"]
    assert raw.headers["X-Ignored-Fields"] == "some_unknown_field"
    assert raw.parse().choices[0].text.strip() == FIELDS
    with client.completions.with_streaming_response.create(**GREEDY, stream=True) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_models(client: OpenAI) -> None:
    """models.list, models.retrieve"""
    assert [model.id for model in client.models.list()] == [BASE, "address_parse", "sentiment_mixed"]
    assert client.models.retrieve("address_parse:1").to_dict()["version"] == 1


def test_errors(client: OpenAI) -> None:
    """Errors as the client's exceptions, with code and param"""
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nope", prompt="x")
    assert missing.value.code == "not_found" and missing.value.request_id
    for wrong in ({"suffix": "y"}, {"logprobs": 6}, {"temperature": -1}, {"max_tokens": 0}, {"prompt": []}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**GREEDY | wrong)
        assert refused.value.param == next(iter(wrong))
    with pytest.raises(openai.BadRequestError) as tools:
        function: Any = {"type": "function", "function": {"name": "f"}}
        client.chat.completions.create(model=BASE, messages=MESSAGES, tools=[function])
    assert tools.value.param == "tools"


def test_timeout_and_retries(client: OpenAI) -> None:
    """A deadline is APITimeoutError or 504; an address where nobody listens is tried again"""
    with pytest.raises(openai.InternalServerError) as late:
        client.completions.create(
            model=BASE,
            prompt="x",
            max_tokens=4000,
            extra_headers={"X-Request-Timeout": "0.2"},
            extra_body={"ignore_eos": True},
        )
    assert late.value.status_code == 504 and late.value.code == "deadline_exceeded"
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(model=BASE, prompt="x", max_tokens=4000, timeout=0.3, extra_body={"ignore_eos": True})
    assert client.completions.create(**GREEDY).choices[0].text.strip() == FIELDS, "and the server goes on"
