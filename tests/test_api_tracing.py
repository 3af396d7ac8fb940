"""Traces: a span for each request that a model worked for, with what it did; nothing where nobody asks for it."""

from __future__ import annotations

import builtins
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.background import BackgroundTask
from starlette.testclient import TestClient

from app.api.tracing import VARIABLES, Tracing
from app.config import Settings
from app.errors import EngineFailed, InvalidSettings
from app.main import create_app, serve
from tests.api_harness import Harness

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"  # the example of W3C Trace Context
BODY = {"task": "mood", "input": "the first", "max_tokens": 100}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)
    # What the instrumentation puts around every background task of the process.
    monkeypatch.setattr(BackgroundTask, "__call__", BackgroundTask.__call__)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def harness(tmp_path: Path, exporter: InMemorySpanExporter) -> Harness:
    harness = Harness.create(tmp_path / "prompts")
    harness.publish("mood", labels=["x", "y"])
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = Tracing(provider)
    harness.app = create_app(harness.settings, harness.engine, harness.registry, harness.base, tracing=tracing)
    return harness


@pytest.fixture
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


def spans(exporter: InMemorySpanExporter) -> tuple[ReadableSpan | None, ReadableSpan]:
    """Of one request: what the model did for it, and the request's own."""
    found = exporter.get_finished_spans()
    exporter.clear()
    [request] = [span for span in found if span.kind is SpanKind.SERVER]
    [work] = [span for span in found if span is not request] or [None]
    if work is not None:
        assert work.parent is not None and work.parent == request.get_span_context()
    return work, request


def work(exporter: InMemorySpanExporter) -> dict[str, Any]:
    found, _ = spans(exporter)
    assert found is not None
    return dict(found.attributes or {})


@pytest.mark.parametrize("stream", [False, True])
def test_a_generation(harness: Harness, client: TestClient, exporter: InMemorySpanExporter, stream: bool) -> None:
    assert client.post("/v1/generate", json=BODY | {"stream": stream}).status_code == 200
    span, request = spans(exporter)
    assert span is not None and span.name == "text_completion mood:1" and span.status.is_unset
    assert request.name == "POST /v1/generate" and request.parent is None
    found = dict(span.attributes or {})
    assert isinstance(found.pop("gen_ai.usage.input_tokens"), int)
    assert found.pop("gen_ai.usage.output_tokens") == len(harness.engine.answer)
    assert found == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "softprompt",
        "gen_ai.request.model": "mood",
        "gen_ai.response.model": "mood:1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.cache_read.input_tokens": 0,
        "softprompt.digest": (harness.registry.resolve("mood").digest,),
    }


def test_other_operations(harness: Harness, client: TestClient, exporter: InMemorySpanExporter) -> None:
    base = harness.base.info.name
    client.post("/v1/chat/completions", json={"model": base, "messages": [{"role": "user", "content": "x"}]})
    chat = work(exporter)
    assert (chat["gen_ai.operation.name"], chat["gen_ai.response.model"]) == ("chat", base)
    client.post("/v1/classify", json={"task": "mood", "input": ["a", "b"]})
    assert work(exporter)["gen_ai.response.finish_reasons"] == ("scored", "scored")
    client.get("/v1/tasks/mood")
    assert spans(exporter)[0] is None
    client.post("/v1/generate", json=BODY | {"task": "nobody"})
    assert spans(exporter)[0] is None, "nothing was done for it"
    harness.engine.fail_after = (1, EngineFailed("x"))
    client.post("/v1/generate", json=BODY | {"stream": True})
    failed, _ = spans(exporter)
    assert failed is not None and failed.status.status_code is StatusCode.ERROR and failed.attributes is not None
    assert failed.attributes["error.type"] == "engine_failed" and failed.attributes["softprompt.abort_cause"] == "error"
    for path in ("/livez", "/readyz", "/health", "/metrics"):
        client.get(path)
    assert exporter.get_finished_spans() == ()


def test_the_clients_trace_goes_on_here_and_in_the_log(
    client: TestClient, exporter: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[dict[str, Any]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            import structlog

            seen.append(structlog.contextvars.get_contextvars() | {"message": record.getMessage()})

    log = logging.getLogger("softprompt.access")
    handler = Handler()
    log.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO):
            client.post("/v1/generate", json=BODY, headers={"traceparent": TRACEPARENT})
    finally:
        log.removeHandler(handler)
    _, span = spans(exporter)
    context = span.get_span_context()
    assert span.parent is not None and context is not None
    assert f"{span.parent.span_id:016x}" == PARENT and f"{context.trace_id:032x}" == TRACE
    [line] = seen
    assert line["trace_id"] == TRACE and line["span_id"] == f"{context.span_id:016x}" != PARENT


def test_a_malformed_parent_is_none(client: TestClient, exporter: InMemorySpanExporter) -> None:
    for header in ("", "00-x", "ff-" + "0" * 100, "00-" + "0" * 32 + "-" + "0" * 16 + "-01", TRACEPARENT * 50):
        assert client.post("/v1/generate", json=BODY, headers={"traceparent": header}).status_code == 200
        assert spans(exporter)[1].parent is None


# -- when there are any ------------------------------------------------------------------------------------------------


def tracing(**settings: Any) -> Tracing | None:
    found = Tracing.of(Settings(**settings))
    if found is not None:
        found.shut_down()
    return found


def endpoint(found: Tracing | None) -> str:
    assert found is not None
    [processor] = found._provider._active_span_processor._span_processors
    return processor.span_exporter._endpoint  # type: ignore[attr-defined,no-any-return]


def test_off_unless_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracing() is None
    assert endpoint(tracing(otlp_endpoint="http://127.0.0.1:1/")) == "http://127.0.0.1:1/v1/traces"
    for name, value in zip(VARIABLES, ("http://127.0.0.1:2", "http://127.0.0.1:3/own"), strict=True):
        monkeypatch.setenv(name, value)
        expected = value if "TRACES" in name else f"{value}/v1/traces"
        assert endpoint(tracing()) == expected
    assert endpoint(tracing(otlp_endpoint="http://127.0.0.1:1")) == "http://127.0.0.1:1/v1/traces"
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert tracing() is None
    monkeypatch.delenv("OTEL_TRACES_EXPORTER")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing() is None


def test_the_service_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in (("", "softprompt"), ("mine", "mine")):
        monkeypatch.setenv("OTEL_SERVICE_NAME", given)
        found = tracing(otlp_endpoint="http://127.0.0.1:1")
        assert found is not None and found._provider.resource.attributes["service.name"] == expected


def test_without_the_libraries_the_start_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert tracing() is None
    with pytest.raises(InvalidSettings, match=r"SOFTPROMPT_OTLP_ENDPOINT asks for traces.*softprompt\[otel\]"):
        tracing(otlp_endpoint="http://127.0.0.1:1")
    monkeypatch.setenv(VARIABLES[0], "http://127.0.0.1:2")
    with pytest.raises(InvalidSettings, match=VARIABLES[0]):
        tracing()
    monkeypatch.setattr("app.main.load_base", lambda *_, **__: pytest.fail("it is said before the model is read"))
    with pytest.raises(InvalidSettings, match=VARIABLES[0]):
        serve(Settings(registry=tmp_path, port=0))


def test_a_collector_that_is_away_holds_up_nothing(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.api.tracing.LAST_SPANS", 0.05)
    away = Tracing.of(Settings(otlp_endpoint="http://127.0.0.1:1"))
    assert away is not None
    app = create_app(harness.settings, harness.engine, harness.registry, harness.base, tracing=away)
    with TestClient(app) as client:
        assert client.post("/v1/generate", json=BODY).status_code == 200
