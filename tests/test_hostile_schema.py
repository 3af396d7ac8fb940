"""schemathesis over every operation of the OpenAPI document: data that fits it and data that does not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.python.asgi import get_client

from tests.api_harness import Harness, events
from tests.long_run import report
from tests.test_api_errors import check
from tests.tiny import CHAT_TEMPLATE

COUNT = int(os.environ.get("HOSTILE_SCHEMA_COUNT", "1500"))  # examples of each operation and mode in the long run
OPENAI = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
CHUNKS: dict[str, type[BaseModel]] = {"/v1/completions": Completion, "/v1/chat/completions": ChatCompletionChunk}
ROOM = (503, 507)  # documented: no room, not ready; no space
CHECKS = [content_type_conformance, response_headers_conformance, status_code_conformance]


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Harness:
    harness = Harness.create(tmp_path / "prompts", max_body_bytes=100_000)
    harness.publish("sentiment", labels=["x", "y"])
    monkeypatch.setattr(harness.base.tokenizer, "chat_template", CHAT_TEMPLATE)
    return harness


def operations(harness: Harness) -> Iterator[Any]:
    for result in schemathesis.openapi.from_asgi("/openapi.json", harness.app).get_all_operations():
        yield result.ok()


def modes(operation: Any) -> list[GenerationMode]:
    """An operation that takes only texts, in path and headers, has nothing that does not fit: the search is long."""
    definition = operation.definition.raw
    takes = {parameter["in"] for parameter in definition.get("parameters", [])}
    only_texts = takes <= {"path", "header"} and "requestBody" not in definition
    return [GenerationMode.POSITIVE] if only_texts else [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]


def _name_what_there_is(case: Any) -> None:
    """Of a task there is one of a billion names: nearly every request would end as a 404."""
    if case.path in OPENAI and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "sentiment"


def _check_chunks(path: str, text: str) -> int:
    """Every event of a stream as the openai package has it; how many there were."""
    chunks = [event for event in events(text) if "error" not in event]
    for chunk in chunks:
        for choice in chunk["choices"]:
            if path == "/v1/completions":  # its type is that of a whole reply, with a reason to end
                choice["finish_reason"] = choice["finish_reason"] or "stop"
                for name, least in (("token_logprobs", 0.0), ("top_logprobs", {})):  # an echo's first token has none
                    if choice["logprobs"]:
                        choice["logprobs"][name] = [found or least for found in choice["logprobs"][name]]
        CHUNKS[path].model_validate(chunk, strict=True)
    return len(chunks)


def exercise(harness: Harness, count: int) -> Counter[str]:
    """`count` examples of each operation that fit, and as many that do not; how many replies had which status."""
    found: Counter[str] = Counter()
    fits = {GenerationMode.POSITIVE: "positive", GenerationMode.NEGATIVE: "negative"}
    with get_client(harness.app) as client:
        for operation in operations(harness):
            for mode in modes(operation):
                strategy = operation.as_strategy(generation_mode=mode)

                @given(case=strategy)
                @settings(
                    max_examples=count,
                    phases=[Phase.explicit, Phase.generate],
                    suppress_health_check=list(HealthCheck),
                    database=None,
                )
                def run(case: Any) -> None:
                    _name_what_there_is(case)
                    reply = case.call(session=client)
                    harness.engine.calls.clear()
                    streamed = reply.headers["content-type"][0].startswith("text/event-stream")
                    late = reply.status_code == 504 and "X-Request-Timeout" in (case.headers or {})  # as it asked
                    server = [] if late or reply.status_code in ROOM else [not_a_server_error]
                    # The document calls an event a string; what OpenAI's clients read is held to their own types.
                    body = [] if streamed else [response_schema_conformance]
                    case.validate_response(reply, checks=[*CHECKS, *server, *body])
                    if streamed and case.path in CHUNKS:
                        found[f"chunks {case.path}"] += _check_chunks(case.path, reply.content.decode())
                    if reply.status_code == 200 and case.path in OPENAI:
                        found[f"200 {case.path}"] += 1
                    found["late" if late else f"{fits[mode]} {reply.status_code // 100}xx"] += 1  # noqa: B023 (run at once)

                run()
    return found


def test_every_operation(harness: Harness) -> None:
    found = exercise(harness, 3)
    assert found.total() > 100 and found["positive 2xx"] > 12 and found["negative 4xx"] > 25, found
    assert not found["positive 5xx"] + found["negative 5xx"]


@pytest.mark.long
@pytest.mark.timeout(0)
def test_every_operation_at_length(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    found = exercise(harness, COUNT)
    with capsys.disabled():
        report(f"{COUNT} examples: {found.total()} replies, {dict(found)}")


def test_the_error_body_is_the_documented_one(harness: Harness) -> None:
    with harness.client() as client:
        document = client.get("/openapi.json").json()
        reply = client.post("/v1/generate", json={"input": 1})
        check(reply, 400)
        described = document["paths"]["/v1/generate"]["post"]["responses"]["4XX"]["content"]["application/problem+json"]
        assert set(described["schema"]["required"]) == set(reply.json())
