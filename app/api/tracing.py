"""OpenTelemetry, where a collector is named: a span for every request, and one in it for what the model did.

Attributes are those of OpenTelemetry's conventions for generative AI, as far as they fit; what is ours alone begins
with `softprompt.`. The libraries are the extra `[otel]`, imported only where traces are asked for.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from app.errors import InvalidSettings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from opentelemetry.sdk.trace import TracerProvider

    from app.api.request_stats import RequestStats
    from app.config import Settings

VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")  # OpenTelemetry's own
NOT_TRACED = "/livez$,/readyz$,/health$,/metrics$"  # searched for in the whole URL
LAST_SPANS = 2.0  # seconds that a shutdown waits for a collector to take them
OPERATIONS = {  # of ours -> what the conventions call them
    "generate": "text_completion",
    "create_completion": "text_completion",
    "create_chat_completion": "chat",
    "classify": "classify",
}


class Tracing:
    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._base_name = ""

    @classmethod
    def of(cls, settings: Settings) -> Tracing | None:
        """None where nobody asks for traces. Raises InvalidSettings where the libraries are missing."""
        named = [name for name in VARIABLES if os.environ.get(name)]
        wanted = "SOFTPROMPT_OTLP_ENDPOINT" if settings.otlp_endpoint else named[0] if named else None
        is_off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
        if wanted is None or is_off or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise InvalidSettings(
                f"{wanted} asks for traces, and {error.name} is not installed: pip install 'softprompt[otel]'"
            ) from None
        resource = Resource.create()
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "softprompt"}))
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        endpoint = f"{settings.otlp_endpoint.rstrip('/')}/v1/traces" if settings.otlp_endpoint else None
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider)

    def install(self, app: FastAPI, base_name: str) -> None:
        """Before the first request. A client's `traceparent` (W3C Trace Context) makes its span the parent.

        Spans of the bare base model bear `base_name`.
        """
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        self._base_name = base_name
        # Spans for each piece of a stream would be thousands.
        FastAPIInstrumentor.instrument_app(
            app, tracer_provider=self._provider, excluded_urls=NOT_TRACED, exclude_spans=["receive", "send"]
        )

    def shut_down(self) -> None:
        """Send what is left, for as long as a collector that is away may keep a server from ending. Blocks."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(LAST_SPANS)

    def ids(self) -> dict[str, str]:
        """Of the current span, for log lines."""
        from opentelemetry import trace

        context = trace.get_current_span().get_span_context()
        if not context.is_valid:
            return {}
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    def describe(self, operation: str, stats: RequestStats, seconds: float) -> None:
        """A span, within the request's, of what the model did in the last so many seconds."""
        from opentelemetry.trace import StatusCode

        if operation not in OPERATIONS or not stats.is_admitted:
            return
        # NOTE: a span of its own, because the request's ends with the last byte sent, before the answers are closed.
        versions = [version for version in stats.versions if version is not None]
        model = ",".join(version.reference for version in versions) or self._base_name
        now = time.time_ns()
        span = self._provider.get_tracer(__name__).start_span(
            f"{OPERATIONS[operation]} {model}", start_time=now - int(seconds * 1e9)
        )
        found: dict[str, Any] = {
            "gen_ai.operation.name": OPERATIONS[operation],
            "gen_ai.provider.name": "softprompt",
            "gen_ai.request.model": stats.reference or self._base_name,
            "gen_ai.response.model": model,
            "gen_ai.response.finish_reasons": stats.finish_reasons,
            "gen_ai.usage.input_tokens": stats.num_prompt_tokens,
            "gen_ai.usage.output_tokens": stats.num_generated_tokens,
            "gen_ai.usage.cache_read.input_tokens": stats.num_cached_tokens,
            "softprompt.digest": [version.digest for version in versions],
        }
        if stats.cause is not None:
            found |= {"softprompt.abort_cause": stats.cause, "error.type": stats.error_code or stats.cause}
            span.set_status(StatusCode.ERROR)
        span.set_attributes(found)
        span.end(now)
