"""The text of /metrics: vLLM's names behind our own prefix, and as vLLM writes them too if that is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

import app
from app.api.counts import Counts, Histogram, TaskCounts
from app.base_model import BaseModel
from app.engine import Engine
from app.jobs import JobStore
from app.registry import Registry

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "softprompt_"
VLLM = "vllm:"
VLLM_ENGINE = "0"  # vLLM's label `engine`: the number of a data-parallel rank

Labels = dict[str, str]
Sees = Callable[[str], bool]


class Metrics:
    """Counts requests, and tells of them, of the engine and of the registry."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        base: BaseModel,
        jobs: JobStore,
        *,
        is_ready: Callable[[], bool],
        vllm: bool,
    ) -> None:
        """`vllm` adds the twins that a vLLM dashboard asks for."""
        self.counts = Counts(lambda: [task.name for task in registry.tasks()])
        self._engine = engine
        self._registry = registry
        self._base = base
        self._jobs = jobs
        self._is_ready = is_ready
        self._vllm = vllm
        # Ours alone: nothing that a library registers for itself is told here.
        self._process = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._process)

    def text(self, sees: Sees) -> bytes:
        """In Prometheus's text format. Of tasks only those are named that `sees` lets the reader know of.

        Takes some milliseconds for a thousand tasks, and waits for no lock of the registry or the engine.
        """
        registry = CollectorRegistry()
        registry.register(_Families(partial(self._families, sees)))
        return generate_latest(registry) + generate_latest(self._process)

    def _families(self, sees: Sees) -> Iterator[Metric]:
        base = self._base.info.name
        model = {"model_name": base}
        by_task = {name: found for name, found in self.counts.by_task().items() if sees(name or base)}
        yield from self._shared(PREFIX, model, by_task)
        yield from self._ours(model)
        if self._vllm:
            yield from self._shared(VLLM, model | {"engine": VLLM_ENGINE}, None)

    def _shared(self, prefix: str, labels: Labels, by_task: Mapping[str, TaskCounts] | None) -> Iterator[Metric]:
        """What vLLM has too. `by_task` None: all together, without names, as vLLM knows of none."""
        stats, counts = self._engine.stats(), self.counts
        for name, text, value in (
            ("num_requests_running", "Rows that the model runs in a batch", stats.running),
            ("num_requests_waiting", "Rows that wait for their turn", stats.waiting),
            ("kv_cache_usage_perc", "KV cache in use; 1 is all of it", stats.kv_blocks_used / stats.kv_blocks_total),
        ):
            yield _gauge(prefix + name, text, labels, value)
        for name, text, value in (
            ("prefix_cache_queries", "Tokens of text that were looked for in the KV cache", stats.queried_tokens),
            ("prefix_cache_hits", "Tokens of text that were found there", stats.cached_tokens),
        ):
            yield _counter(prefix + name, text, labels, value)
        own: tuple[str, ...] = () if by_task is None else ("task",)
        named: dict[Any, TaskCounts] = {(): counts.all}
        if by_task is not None:
            named = {(name,): found for name, found in by_task.items()}
        read = {key: found.prompt_tokens for key, found in named.items()}
        yield _counters(prefix + "prompt_tokens", "Tokens of text that were read", labels, own, read)
        written = {key: found.generation_tokens for key, found in named.items()}
        yield _counters(prefix + "generation_tokens", "Tokens that were generated", labels, own, written)
        ends = {(*key, end): count for key, found in named.items() for end, count in found.finished.copy().items()}
        text = "Answers by how they ended: stop, length, or scored for a classification"
        yield _counters(prefix + "request_success", text, labels, (*own, "finished_reason"), ends)
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From a request, once it is read, to its first token", counts.first_token),
            ("inter_token_latency_seconds", "From one token of an answer to the next", counts.between_tokens),
            ("request_queue_time_seconds", "Until the model began with a generation", counts.queue),
            ("e2e_request_latency_seconds", "From a request, once it is read, to the end of its reply", counts.request),
        ):
            yield _histogram(prefix + name, text, labels, histogram)

    def _ours(self, labels: Labels) -> Iterator[Metric]:
        stats, counts, registry = self._engine.stats(), self.counts, self._registry
        for name, text, value in (
            ("prompt_loads", "Times a soft prompt's keys and values were computed or copied in", stats.prefix_loads),
            ("prompt_evictions", "Soft prompts that had to leave the KV cache", stats.prefix_evictions),
            ("prompt_swaps", "Times an alias changed from one version to another", registry.num_swaps),
            ("engine_restarts", "Times the engine died and started again", stats.restarts),
            ("preemptions", "Rows that gave their memory up and were computed again", stats.preemptions),
            ("engine_steps", "Forward passes over a batch", stats.steps),
        ):
            yield _counter(PREFIX + name, text, labels, value)
        for name, text, value in (
            ("prompts_resident", "Soft prompts, and inputs being classified, in the KV cache", stats.prefixes),
            ("engine_ready", "1 while the engine runs", stats.ready),
            ("ready", "1 while /readyz says so", self._is_ready()),
            ("tasks", "Tasks in the registry", len(registry.tasks())),
            ("registry_trouble", "1 while a log is damaged or the folder cannot be read", bool(registry.trouble())),
        ):
            yield _gauge(PREFIX + name, text, labels, value)
        states = {(status,): count for status, count in self._jobs.counts().items()}
        yield _gauges(PREFIX + "training_jobs", "Training jobs that are not finished", labels, ("state",), states)
        text = "Keys and values of soft prompts, in the KV cache and in host memory behind it"
        resident = {("kv_cache",): stats.prefix_bytes, ("host",): stats.host_bytes}
        yield _gauges(PREFIX + "prompt_resident_bytes", text, labels, ("tier",), resident)
        aborts, rejected = _keyed(counts.aborts), _keyed(counts.rejected_uploads)
        text = "Requests that ended before they were answered"
        yield _counters(PREFIX + "aborts", text, labels, ("cause",), aborts)
        text = "Uploads that were refused, by the error's code"
        yield _counters(PREFIX + "uploads_rejected", text, labels, ("code",), rejected)
        text, own = "Replies by operation and status", ("operation", "status")
        yield _counters(PREFIX + "http_requests", text, labels, own, counts.replies.copy())
        info = {"version": app.__version__, "backend": self._engine.backend, "device": str(self._base.device)}
        yield _gauge(PREFIX + "build_info", "What runs here; always 1", labels | info, 1)


class _Families(Collector):
    """What prometheus-client wants to ask for metrics."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        return self._collect()

    def describe(self) -> list[Metric]:
        return []


def _gauge(name: str, text: str, labels: Labels, value: float) -> GaugeMetricFamily:
    return _gauges(name, text, labels, (), {(): value})


def _gauges(
    name: str, text: str, labels: Labels, own: tuple[str, ...], values: Mapping[Any, float]
) -> GaugeMetricFamily:
    """One metric, by values of its `own` labels."""
    family = GaugeMetricFamily(name, text, labels=[*labels, *own])
    for key, value in values.items():
        family.add_metric([*labels.values(), *key], float(value))
    return family


def _counter(name: str, text: str, labels: Labels, value: float) -> CounterMetricFamily:
    return _counters(name, text, labels, (), {(): value})


def _counters(
    name: str, text: str, labels: Labels, own: tuple[str, ...], values: Mapping[Any, float]
) -> CounterMetricFamily:
    """One metric, by values of its `own` labels."""
    family = CounterMetricFamily(name, text, labels=[*labels, *own])
    for key, value in values.items():
        family.add_metric([*labels.values(), *key], value)
    return family


def _histogram(name: str, text: str, labels: Labels, histogram: Histogram) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), histogram.buckets(), histogram.sum)
    return family


def _keyed(counts: Counter[str]) -> dict[tuple[str], int]:
    return {(key,): count for key, count in counts.copy().items()}
