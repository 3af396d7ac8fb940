"""`softprompt bench`: load against a server that runs, and what its clients see of it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli import errors
from app.cli.output import AsJson, write, write_json, write_table
from app.cli.rows import read_rows
from app.cli.server import ApiKey, Url, complete_reference, connect_async, finite

if TYPE_CHECKING:
    from app.client import AsyncClient

PERCENTILES = (50, 90, 95, 99)
TEXT = "The quick brown fox jumps over the lazy dog while the rain falls softly on the old stone bridge in town."

app = typer.Typer()


@app.command(epilog="Example: softprompt bench sentiment_mixed clinc_domain --concurrency 16 --requests 200")
def bench(
    tasks: Annotated[
        list[str],
        typer.Argument(help="Tasks, asked in turn; the base model's name too", autocompletion=complete_reference),
    ],
    concurrency: Annotated[int, typer.Option(min=1, max=10_000, help="Requests at once")] = 8,
    requests: Annotated[
        int | None, typer.Option(min=1, help="So many requests; default: 100, if no --duration")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.01, help="Seconds in which requests are begun", callback=finite)
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of each request, all of them made")] = 64,
    data: Annotated[Path | None, typer.Option(help='JSONL of {"input"}, in turn; default: one sentence')] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Answers do not end before --max-tokens")] = True,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Measure a running server: time to the first token, between tokens and in all, throughput, errors.

    Requests are streamed and never made again. Between tokens is the time from the first piece of an answer to its
    last, by the tokens in between. Exit code 6 if a request failed.
    """
    if requests is None and duration is None:
        requests = 100
    texts = [TEXT] if data is None else _inputs(data)
    turns = zip(itertools.cycle(tasks), itertools.cycle(texts), strict=False)
    load = _Load(max_tokens, ignore_eos, duration)
    client = connect_async(url, api_key, connections=concurrency, retries=0)
    asyncio.run(load.run(client, tasks, itertools.islice(turns, requests), concurrency))
    report = load.report()
    if as_json:
        write_json(report)
    else:
        _show(report)
    if load.errors:
        raise typer.Exit(errors.PARTIAL)


@dataclass
class _Load:
    max_tokens: int
    ignore_eos: bool
    duration: float | None
    errors: Counter[str] = field(default_factory=Counter)
    by_task: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)  # seconds, each
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    async def run(
        self, client: AsyncClient, tasks: Sequence[str], turns: Iterator[tuple[str, str]], concurrency: int
    ) -> None:
        begun = 0.0

        async def ask_some() -> None:
            for task, text in turns:
                await self._ask(client, task, text)
                if self.duration is not None and time.perf_counter() - begun >= self.duration:
                    return

        async with client:
            for task in set(tasks):  # a wrong name is no load
                await client.model(task)
            begun = time.perf_counter()
            await asyncio.gather(*(ask_some() for _ in range(concurrency)))
        self.seconds = time.perf_counter() - begun

    async def _ask(self, client: AsyncClient, task: str, text: str) -> None:
        from app.client import ClientError

        begun = time.perf_counter()
        first = last = None
        try:
            async with client.stream(task, text, max_tokens=self.max_tokens, ignore_eos=self.ignore_eos) as stream:
                async for event in stream:
                    if event.index is not None:
                        last = time.perf_counter()
                        first = first or last
        except ClientError as error:
            self.errors[error.code] += 1
            return
        ended = time.perf_counter()
        self.by_task[task] += 1
        self.whole.append(ended - begun)
        usage = stream.usage
        if usage is None or first is None or last is None:
            return
        self.first.append(first - begun)
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        if usage.completion_tokens > 1:
            self.between.append((last - first) / (usage.completion_tokens - 1))

    def report(self) -> dict[str, Any]:
        """Times in milliseconds."""
        done = len(self.whole)
        return {
            "seconds": round(self.seconds, 3),
            "requests": done,
            "errors": dict(self.errors),
            "by_task": dict(self.by_task),
            "requests_per_second": round(done / self.seconds, 2),
            "output_tokens_per_second": round(self.completion_tokens / self.seconds, 1),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "time_to_first_token_ms": _summary(self.first),
            "inter_token_latency_ms": _summary(self.between),
            "request_latency_ms": _summary(self.whole),
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest, as numpy has it by default. `values` are sorted, and there are some."""
    place = (len(values) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    values = sorted(1_000 * value for value in seconds)
    found = {"mean": sum(values) / len(values), **{f"p{p}": percentile(values, p) for p in PERCENTILES}}
    return {name: round(value, 2) for name, value in {**found, "max": values[-1]}.items()}


def _show(report: dict[str, Any]) -> None:
    errors = sum(report["errors"].values())
    named = ", ".join(f"{code} {count}" for code, count in sorted(report["errors"].items()))
    write(
        f"{report['requests']} requests in {report['seconds']:.1f} s, {errors} errors{f' ({named})' if named else ''}"
    )
    write(f"{report['output_tokens_per_second']} tokens/s, {report['requests_per_second']} requests/s")
    if not report["requests"]:
        return
    names = {
        "time to first token": "time_to_first_token_ms",
        "between tokens": "inter_token_latency_ms",
        "whole request": "request_latency_ms",
    }
    shown = {name: report[key] for name, key in names.items() if report[key]}
    columns = list(next(iter(shown.values())))
    write_table(("ms", *columns), ((name, *(times[column] for column in columns)) for name, times in shown.items()))


def _inputs(path: Path) -> list[str]:
    def make(row: dict[str, Any]) -> dict[str, Any]:
        return row

    with open(path, "rb") as file:
        rows = [row.request["input"] for row in read_rows(file, make) if row.request and "input" in row.request]
    if not rows or not all(isinstance(text, str) for text in rows):
        raise typer.BadParameter(f"{path} needs rows with a text as their input", param_hint="--data")
    return rows
