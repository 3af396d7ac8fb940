"""Completions by the real engine on a tiny model: scores against transformers, and how texts end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from app.config import Settings
from app.engine.local import LocalEngine
from app.main import create_app
from app.registry import Registry, Store
from tests.api_harness import files
from tests.tiny import tiny_base

BASE = tiny_base("llama")
TEXT = "the first one"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    root = tmp_path_factory.mktemp("engine") / "prompts"
    engine = LocalEngine(BASE.model, BASE.info, max_num_seqs=8, kv_cache_tokens=4096)
    engine.start()
    settings = Settings(registry=root, allowed_hosts=("*",))
    with TestClient(create_app(settings, engine, Registry(Store(root), BASE.info), BASE)) as client:
        assert client.post("/v1/tasks/task/versions", files=files()).status_code == 201
        yield client


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    reply = client.post("/v1/completions", json={"model": "tiny-llama", "temperature": 0, **body})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scores_of_a_prompt(client: TestClient, max_tokens: int) -> None:
    """With one new token, as lm-evaluation-harness asks for, also if that token ends the text."""
    ids: list[int] = BASE.tokenizer(TEXT)["input_ids"]
    with torch.inference_mode():
        logits = BASE.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logits[i, token_id]) for i, token_id in enumerate(ids[1:])]
    likeliest = int(logits[-1].argmax())
    for stops in ([], [likeliest]):
        body = {"echo": True, "logprobs": 2, "max_tokens": max_tokens, "stop_token_ids": stops}
        [by_text, by_ids] = (complete(client, prompt=prompt, **body)["choices"][0] for prompt in (TEXT, [ids]))
        assert by_text == by_ids
        logprobs = by_text["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(ids) + max_tokens}
        assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)
        for position, top in enumerate(logprobs["top_logprobs"][1 : len(ids)]):
            assert max(top.values()) == pytest.approx(float(logits[position].max()), abs=1e-4)
        assert by_text["finish_reason"] == ("stop" if stops and max_tokens else "length")


def test_a_task_is_scored_behind_its_prompt(client: TestClient) -> None:
    plain, task = (
        complete(client, model=model, prompt=TEXT, echo=True, logprobs=0, max_tokens=0)
        for model in ("tiny-llama", "task")
    )
    scores = task["choices"][0]["logprobs"]["token_logprobs"]
    assert scores[0] is None and scores != plain["choices"][0]["logprobs"]["token_logprobs"]
    reply = client.post("/v1/generate", json={"task": "task", "input": TEXT, "prompt_logprobs": 0, "max_tokens": 0})
    assert scores[1:] == [entry["logprob"] for entry in reply.json()["outputs"][0]["prompt_logprobs"][1:]]
    assert task["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    assert task["usage"]["prompt_tokens_details"]["soft_prompt_tokens"] == 4


def test_a_stop_token_in_the_text(client: TestClient) -> None:
    whole = complete(client, prompt=TEXT, max_tokens=12, ignore_eos=True, return_token_ids=True)["choices"][0]
    ids = whole["token_ids"]
    stop = ids[5]
    cut = ids.index(stop)
    body = {"prompt": TEXT, "max_tokens": 12, "ignore_eos": True, "stop_token_ids": [stop]}
    for include in (False, True):
        choice = complete(client, **body, include_stop_str_in_output=include)["choices"][0]
        assert choice["text"] == BASE.tokenizer.decode(ids[: cut + include], skip_special_tokens=True)
        assert choice["finish_reason"] == "stop" and choice["logprobs"] is None


def test_cached_text_is_counted(client: TestClient) -> None:
    prompt = "the cached text of a prompt, long enough for more than one block of the cache, and then some"
    first, second = (complete(client, prompt=prompt, max_tokens=1, cache_salt="own")["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert 0 < second["prompt_tokens_details"]["cached_tokens"] < second["prompt_tokens"] == first["prompt_tokens"]


def test_json_by_schema(client: TestClient) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["the", "one"]}}}
    found = client.post(
        "/v1/chat/completions",
        json={"model": "task", "messages": [{"role": "user", "content": "x"}], "response_format": schema, "seed": 1},
    )
    assert found.json()["choices"][0]["message"]["content"] in ('"the"', '"one"'), found.text
