"""From single runs to medians and paired ratios. Nothing else in this folder computes a number twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

Run = Mapping[str, Any]


def throughput(run: Run) -> float:
    return float(run["tokens"] / run["seconds"])


def first_token(run: Run) -> float:
    """Median over the rows of one run, in milliseconds."""
    return 1000 * float(median(run["ttft"]))


def slowest_first_token(run: Run) -> float:
    return 1000 * float(max(run["ttft"]))


def decode_step(run: Run) -> float:
    """Milliseconds between two tokens of a run with one row."""
    return float(1000 * (run["seconds"] - run["ttft"][0]) / (run["tokens"] - 1))


def wire(direction: str) -> Callable[[Run], float | None]:
    """Bytes a request, of systems that are asked over HTTP."""
    return lambda run: run[direction] / run["requests"] if direction in run else None


METRICS: dict[str, tuple[str, Callable[[Run], float | None]]] = {
    "throughput": ("tokens/s", throughput),
    "ttft": ("first token, ms (median row)", first_token),
    "ttft_max": ("first token, ms (slowest row)", slowest_first_token),
    "step": ("ms a token", decode_step),
    "sent": ("bytes sent a request", wire("bytes_sent")),
    "received": ("bytes received a request", wire("bytes_received")),
}


def point_of(run: Run, axes: Iterable[str]) -> tuple[Any, ...]:
    return tuple(run[axis] for axis in axes)


def table(result: Mapping[str, Any], metric: str) -> dict[tuple[Any, ...], dict[str, float]]:
    """point -> system -> median over the repeats."""
    compute = METRICS[metric][1]
    values: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in result["runs"]:
        if (value := compute(run)) is not None:
            values[point_of(run, result["axes"])][run["system"]].append(value)
    return {point: {name: median(each) for name, each in systems.items()} for point, systems in values.items()}


def ratios(result: Mapping[str, Any], metric: str, baseline: str) -> dict[tuple[Any, ...], dict[str, float]]:
    """point -> system -> median of (its value / the baseline's in the same repeat)."""
    compute = METRICS[metric][1]
    paired: dict[tuple[Any, ...], dict[str, float]] = {
        (*point_of(run, result["axes"]), run["repeat"]): {} for run in result["runs"]
    }
    for run in result["runs"]:
        if (value := compute(run)) is not None:
            paired[(*point_of(run, result["axes"]), run["repeat"])][run["system"]] = value
    values: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (*point, _), systems in paired.items():
        if systems.get(baseline):
            for name, value in systems.items():
                values[tuple(point)][name].append(value / systems[baseline])
    return {point: {name: median(each) for name, each in systems.items()} for point, systems in values.items()}


def agreement(result: Mapping[str, Any], exact: Iterable[str], first: int = 4) -> dict[str, float]:
    """Share of answers whose first tokens are those of the first exact system: all must do the same work."""
    able = [name for name in exact if any(run["system"] == name and run.get("check") for run in result["runs"])]
    reference: dict[tuple[Any, ...], list[list[int]]] = {}
    for run in result["runs"]:
        if able and run["system"] == able[0]:
            reference[(*point_of(run, result["axes"]), run["repeat"])] = run["check"]
    same: dict[str, list[bool]] = defaultdict(list)
    for run in result["runs"]:
        others = reference.get((*point_of(run, result["axes"]), run["repeat"]))
        if others is None or not run.get("check"):
            continue
        for mine, other in zip(run["check"], others, strict=True):
            same[run["system"]].append(mine[:first] == other[:first])
    return {name: sum(each) / len(each) for name, each in same.items()}
