"""LangChain's OpenAI classes: what they send is theirs, the base URL and the model's name are all that is set."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from conftest import BASE, Server, rows
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

CLIENT = "langchain-openai"
ADDRESS = "901 Hamlet St, Evanston, IL 60202\nFields:"
FIELDS = "number: 901 | street: Hamlet St | city: Evanston | state: IL | zip: 60202"


@pytest.fixture
def parser(server: Server) -> OpenAI:
    return OpenAI(
        base_url=server.url,
        api_key="none",
        model="address_parse",
        temperature=0,
        max_tokens=96,
        max_retries=0,
        model_kwargs={"stop": ["\n"]},
    )


def chat(server: Server, **options: Any) -> ChatOpenAI:
    given: dict[str, Any] = {"model": BASE, "temperature": 0, "max_tokens": 24, "max_retries": 0, **options}
    return ChatOpenAI(base_url=server.url, api_key="none", **given)


def test_llm(parser: OpenAI) -> None:
    """OpenAI: invoke, stream, batch, generate with token usage"""
    assert parser.invoke(ADDRESS).strip() == FIELDS
    assert "".join(parser.stream(ADDRESS)).strip() == FIELDS
    assert [text.strip() for text in parser.batch([ADDRESS] * 3)] == [FIELDS] * 3
    found = parser.generate([ADDRESS, ADDRESS])
    assert [answer.text.strip() for [answer] in found.generations] == [FIELDS] * 2
    assert found.llm_output is not None and found.llm_output["token_usage"]["completion_tokens"] > 20


def test_llm_async(parser: OpenAI) -> None:
    """OpenAI: ainvoke, astream, abatch"""

    async def main() -> None:
        assert (await parser.ainvoke(ADDRESS)).strip() == FIELDS
        assert "".join([piece async for piece in parser.astream(ADDRESS)]).strip() == FIELDS
        assert [text.strip() for text in await parser.abatch([ADDRESS] * 2)] == [FIELDS] * 2

    asyncio.run(main())


def test_chain(server: Server) -> None:
    """OpenAI: a chain of template, model and parser, over rows"""
    model = OpenAI(base_url=server.url, api_key="none", model="sentiment_mixed@latest", temperature=0, max_tokens=2)
    chain = PromptTemplate.from_template("{input}\nSentiment:") | model | StrOutputParser()
    data = rows("sentiment_mixed", 16)
    said = chain.batch([{"input": row["input"]} for row in data], config={"max_concurrency": 8})
    assert sum(text.strip().startswith(row["target"]) for text, row in zip(said, data, strict=True)) >= 13


def test_chat(server: Server) -> None:
    """ChatOpenAI: invoke with logprobs and usage, stream, batch"""
    model = chat(server, logprobs=True, top_logprobs=2, seed=1, stream_usage=True)
    found = model.invoke([("system", "Be short."), ("human", "Name a colour.")])
    assert found.text and found.usage_metadata is not None and found.usage_metadata["output_tokens"] > 0
    assert len(found.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert found.response_metadata["finish_reason"] in ("stop", "length")
    pieces = list(model.stream([("system", "Be short."), ("human", "Name a colour.")]))
    assert "".join(piece.text for piece in pieces) == found.text
    usage = [piece.usage_metadata for piece in pieces if piece.usage_metadata]
    assert sum(used["output_tokens"] for used in usage) == found.usage_metadata["output_tokens"]
    assert [again.text for again in chat(server).batch(["Hello"] * 3)] == [chat(server).invoke("Hello").text] * 3


def test_chat_async(server: Server) -> None:
    """ChatOpenAI: ainvoke, astream, n answers"""

    async def main() -> None:
        model = chat(server)
        said = await model.ainvoke("Hello")
        assert "".join([piece.text async for piece in model.astream("Hello")]) == said.text
        many = await chat(server, n=2, temperature=1.0).agenerate([[HumanMessage("Hello")]])
        assert len(many.generations[0]) == 2

    asyncio.run(main())


class Review(BaseModel):
    """A verdict on a film."""

    verdict: str = Field(pattern="^(good|bad)$")
    stars: int = Field(ge=1, le=5)


def test_structured_output(server: Server) -> None:
    """ChatOpenAI: with_structured_output by json_schema; json_mode is JSON"""
    model = chat(server, max_tokens=200)
    found = model.with_structured_output(Review, method="json_schema").invoke("I loved the film. Review it.")
    assert isinstance(found, Review) and found.verdict in ("good", "bad")
    raw = chat(server, max_tokens=400).bind(response_format={"type": "json_object"}).invoke("A JSON object, please.")
    assert raw.response_metadata["finish_reason"] == "length" or isinstance(json.loads(raw.text), dict)


def test_tools_are_refused(server: Server) -> None:
    """ChatOpenAI: bind_tools and function_calling are refused with 400, named"""
    with pytest.raises(Exception, match="tools: is not supported"):
        chat(server).bind_tools([Review]).invoke("Hello")
