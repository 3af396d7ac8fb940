"""Parameters of POST /v1/generate that are missing, of the wrong type, out of range or not supported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from app.api.schemas import GenerateRequest
from tests.api_harness import Harness


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness.create(tmp_path_factory.mktemp("parameters") / "prompts")


@pytest.fixture(scope="module")
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x"] * 257}, "input"),
        ({"input": ["x", 1]}, "input"),
        ({"input": {"a": "b"}}, "input"),
        ({"input": "x", "task": 7}, "task"),
        ({"input": "x", "max_tokens": 0}, "max_tokens"),
        ({"input": "x", "max_tokens": "3"}, "max_tokens"),
        ({"input": "x", "max_tokens": 3.0}, "max_tokens"),
        ({"input": "x", "max_tokens": True}, "max_tokens"),
        ({"input": "x", "max_tokens": 10**12}, "max_tokens"),
        ({"input": "x", "temperature": -0.1}, "temperature"),
        ({"input": "x", "temperature": True}, "temperature"),
        ({"input": "x", "temperature": 1e300}, "temperature"),
        ({"input": "x", "top_p": 0}, "top_p"),
        ({"input": "x", "top_p": 2}, "top_p"),
        ({"input": "x", "top_k": -1}, "top_k"),
        ({"input": "x", "top_k": 2**31}, "top_k"),
        ({"input": "x", "seed": 2**63}, "seed"),
        ({"input": "x", "seed": -(2**63)}, "seed"),
        ({"input": "x", "stop": ""}, "stop"),
        ({"input": "x", "stop": ["a"] * 17}, "stop"),
        ({"input": "x", "stop": "a" * 201}, "stop"),
        ({"input": "x", "stop": [None]}, "stop"),
        ({"input": "x", "stream": "true"}, "stream"),
        ({"input": "x", "stream": 1}, "stream"),
        ({"input": "x", "n": 0}, "n"),
        ({"input": "x", "n": 257}, "n"),
        ({"input": ["x"] * 129, "n": 2}, "n"),
        ({"input": "x", "n": True}, "n"),
        ({"input": "x", "task": []}, "task"),
        ({"input": "x", "task": ["a"] * 17}, "task"),
        ({"input": "x", "task": ["tiny-llama", "tiny-llama"]}, "task"),
        ({"input": ["x"] * 200, "task": ["a", "b"]}, "task"),
        ({"input": "x", "task": ["a", "b"], "n": 2}, "n"),
        ({"input": "x", "task": ["a", "b"], "stream": True}, "stream"),
        ({"input": "x", "task": ["a", "b"], "logprobs": 0}, "logprobs"),
        ({"input": "x", "task": ["a", "b"], "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"input": "x", "logprobs": -1}, "logprobs"),
        ({"input": "x", "logprobs": 21}, "logprobs"),
        ({"input": "x", "logprobs": True}, "logprobs"),
        ({"input": "x", "prompt_logprobs": 10**6}, "prompt_logprobs"),
        ({"input": "x", "presence_penalty": 2.1}, "presence_penalty"),
        ({"input": "x", "frequency_penalty": -2.1}, "frequency_penalty"),
        ({"input": "x", "repetition_penalty": 0}, "repetition_penalty"),
        ({"input": "x", "repetition_penalty": 1e9}, "repetition_penalty"),
        ({"input": "x", "min_p": 1.1}, "min_p"),
        ({"input": "x", "min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"input": "x", "logit_bias": {"7": 101}}, "logit_bias"),
        ({"input": "x", "logit_bias": {"07": 1}}, "logit_bias"),
        ({"input": "x", "logit_bias": {" 7": 1}}, "logit_bias"),
        ({"input": "x", "logit_bias": {"seven": 1}}, "logit_bias"),
        ({"input": "x", "logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"input": "x", "logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"input": "x", "stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"input": "x", "stop_token_ids": [128]}, "stop_token_ids"),
        ({"input": "x", "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"input": "x", "stop_token_ids": [10**19]}, "stop_token_ids"),
        ({"input": "x", "max_tokens": 0, "n": 2, "prompt_logprobs": 0}, "n"),
        ({"input": ["x"] * 16, "n": 8, "logprobs": 20, "min_tokens": 500}, "logprobs"),
        ({"input": "x", "response_format": {"type": "yaml"}}, "response_format"),
        ({"input": "x", "response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"input": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
            "response_format",
        ),
        ({"input": "x", "cache_salt": ""}, "cache_salt"),
        ({"input": ["x"] * 16, "n": 16, "logprobs": 20, "max_tokens": 500}, "logprobs"),
        ({"input": ["x" * 500] * 100, "prompt_logprobs": 20}, "prompt_logprobs"),
        ({"input": "x", "unknown_field": 0.1}, "unknown_field"),
        ({"input": "x", "<script>": 1}, None),
    ],
)
def test_bad_parameters_are_named(
    harness: Harness, client: TestClient, body: dict[str, Any], param: str | None
) -> None:
    reply = client.post("/v1/generate", json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert "<script>" not in reply.text
    assert not harness.engine.calls


@pytest.mark.parametrize("token_id", [-1, 2**31, 10**19])
def test_token_ids_have_bounds_whatever_the_vocabulary(token_id: int) -> None:
    with pytest.raises(ValidationError, match="stop_token_ids"):
        GenerateRequest.model_validate({"input": "x", "stop_token_ids": [token_id]})


def test_logprobs_count_only_what_may_be_generated(client: TestClient) -> None:
    body = {"input": ["x"] * 256, "logprobs": 20, "prompt_logprobs": 0}
    assert client.post("/v1/generate", json={**body, "max_tokens": 500}).status_code == 400
    assert client.post("/v1/generate", json={**body, "max_tokens": 0}).status_code == 200
