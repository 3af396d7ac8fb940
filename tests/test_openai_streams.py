"""What a stream says is what a plain reply says, byte for byte, and that is the definition of the answer."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.api_harness import Harness, events
from tests.stop_oracle import cut_at_stop
from tests.tiny import CHAT_TEMPLATE

NUM_REQUESTS = 500
ALPHABET = ["the", "ing", " pos", "a", "b", " ", "\n", "é", "€", "😀", "<|end|>"]


def text(rng: Random, most: int) -> str:
    return "".join(rng.choices(ALPHABET, k=rng.randint(1, most)))


def wishes(rng: Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "n": rng.randint(1, 3),
        "max_tokens": rng.randint(1, 40),
        "stop": [text(rng, 2) for _ in range(rng.randint(0, 4))],
        "include_stop_str_in_output": rng.random() < 0.3,
        "skip_special_tokens": rng.random() < 0.7,
        "return_token_ids": rng.random() < 0.3,
    }
    return {name: value for name, value in options.items() if rng.random() < 0.8}


def streamed(client: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    reply = client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert reply.status_code == 200, reply.text
    return events(reply.text)


def defined(harness: Harness, body: dict[str, Any]) -> tuple[str, str]:
    """Text and finish reason: decode all, cut at the stop string that is whole first."""
    ids = harness.engine.answer[: body.get("max_tokens", 16)]
    whole = harness.base.tokenizer.decode(ids, skip_special_tokens=body.get("skip_special_tokens", True))
    assert isinstance(whole, str)
    cut, matched = cut_at_stop(whole, body.get("stop", []))
    if matched and body.get("include_stop_str_in_output"):
        ends = [cut + stop for stop in body["stop"] if whole.startswith(cut + stop)]
        cut = min(ends, key=len)
    return cut, "stop" if matched or len(ids) < body.get("max_tokens", 16) else "length"


def test_completions(tmp_path: Path) -> None:
    harness, rng = Harness.create(tmp_path / "prompts"), Random(5)
    with harness.client() as client:
        for _ in range(NUM_REQUESTS):
            harness.answer(text(rng, 12))
            prompts = [text(rng, 4) for _ in range(rng.randint(1, 2))]
            body = {"model": "tiny-llama", "prompt": prompts, "echo": rng.random() < 0.3, **wishes(rng)}
            if rng.random() < 0.3:
                body["logprobs"] = rng.randint(0, 5)
            reply = client.post("/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
            *chunks, last = streamed(client, "/v1/completions", body)
            assert last["usage"] == reply.json()["usage"], body
            for index, choice in enumerate(reply.json()["choices"]):
                own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
                assert "".join(part["text"] for part in own).encode() == choice["text"].encode(), body
                assert own[-1]["finish_reason"] == choice["finish_reason"], body
                expected, reason = defined(harness, body)
                prompt = prompts[index // body.get("n", 1)] if body["echo"] else ""
                assert (choice["text"], choice["finish_reason"]) == (prompt + expected, reason), body
                for name, values in (choice["logprobs"] or {}).items():
                    assert [value for part in own for value in part["logprobs"][name]] == values, body
                ids = [token_id for part in own for token_id in part.get("token_ids", [])]
                assert ids == choice.get("token_ids", []), body


def test_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, rng = Harness.create(tmp_path / "prompts"), Random(6)
    monkeypatch.setattr(harness.base.tokenizer, "chat_template", CHAT_TEMPLATE)
    with harness.client() as client:
        for _ in range(NUM_REQUESTS // 10):
            harness.answer(text(rng, 12))
            body = {"model": "tiny-llama", "messages": [{"role": "user", "content": text(rng, 4)}], **wishes(rng)}
            body.setdefault("max_tokens", 16)
            reply = client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            *chunks, last = streamed(client, "/v1/chat/completions", body)
            assert last["usage"] == reply.json()["usage"], body
            for index, choice in enumerate(reply.json()["choices"]):
                own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
                said = "".join(part["delta"].get("content", "") for part in own)
                assert said == choice["message"]["content"] == defined(harness, body)[0], body
                assert own[-1]["finish_reason"] == choice["finish_reason"] == defined(harness, body)[1], body
