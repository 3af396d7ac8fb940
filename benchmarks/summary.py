"""From single runs to medians and paired ratios. Nothing else in this folder computes a number twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

Run = Mapping[str, Any]

AGREEMENT = 0.95  # least share of equal first tokens between systems that compute in float32


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


def per_request(name: str, scale: float = 1.0) -> Callable[[Run], float | None]:
    """Of what only some systems, or runs, tell."""
    return lambda run: scale * run[name] / run["requests"] if name in run else None


METRICS: dict[str, tuple[str, Callable[[Run], float | None]]] = {
    "throughput": ("tokens/s", throughput),
    "ttft": ("first token, ms (median row)", first_token),
    "ttft_max": ("first token, ms (slowest row)", slowest_first_token),
    "step": ("ms a token", decode_step),
    "sent": ("bytes sent a request", per_request("bytes_sent")),
    "received": ("bytes received a request", per_request("bytes_received")),
    "input": ("ms an input", per_request("seconds", 1000.0)),
    "computed": ("text tokens computed for an input", per_request("computed")),
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


def point_ratios(result: Mapping[str, Any], metric: str) -> dict[tuple[Any, ...], dict[str, float]]:
    """point -> system -> median of (its value / the same system's at the first point in the same repeat)."""
    compute = METRICS[metric][1]
    found = {
        (point_of(run, result["axes"]), run["system"], run["repeat"]): value
        for run in result["runs"]
        if (value := compute(run)) is not None
    }
    first = next((point for point, *_ in found), None)
    values: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (point, system, repeat), value in found.items():
        if baseline := found.get((first, system, repeat)):
            values[point][system].append(value / baseline)
    return {point: {name: median(each) for name, each in systems.items()} for point, systems in values.items()}


def agreement(result: Mapping[str, Any], exact: Iterable[str], first: int = 1) -> dict[str, float]:
    """Share of answers whose first tokens are those of the first exact system that tells: all must do the same work."""
    reference: dict[tuple[Any, ...], list[list[int]]] = {}
    same: dict[str, list[bool]] = defaultdict(list)
    told = [run for run in result["runs"] if run.get("check")]
    able = [name for name in exact if any(run["system"] == name for run in told)]
    for run in told:
        if run["system"] in able[:1]:
            reference[(*point_of(run, result["axes"]), run["repeat"])] = run["check"]
    for run in told:
        others = reference.get((*point_of(run, result["axes"]), run["repeat"]))
        for mine, other in zip(run["check"], others or [], strict=others is not None):
            same[run["system"]].append(mine[:first] == other[:first])
    return {name: sum(each) / len(each) for name, each in same.items()}


def problems(result: Mapping[str, Any], exact: Iterable[str]) -> list[str]:
    """Why these numbers must not be compared, or are not all there."""
    exact = list(exact)
    found = list(result.get("failures", []))
    shares = agreement(result, exact)
    for name in exact:
        if shares.get(name, 1.0) < AGREEMENT:
            found.append(
                f"{name} gives the same first token as {next(iter(n for n in exact if n in shares))} "
                f"in {shares[name]:.1%} of answers only: they do not do the same work"
            )
    for system in dict.fromkeys(run["system"] for run in result["runs"]):
        counts = {
            count
            for run in result["runs"]
            if run["system"] == system and "new" in run
            for count in run.get("token_counts", [])
            if count != run["new"]
        }
        if counts:
            found.append(f"{system} gave answers of {', '.join(map(str, sorted(counts)))} tokens, not what was asked")
    return found
