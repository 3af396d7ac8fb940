"""`python -m benchmarks.report a.json b.json > tables.md`: markdown tables of results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import summary

TITLES = {
    "throughput": "Throughput and time to first token",
    "tasks": "Distinct tasks",
    "ttft": "Time to first token over the length of the soft prompt",
    "decode": "One row against the memory bandwidth",
    "memory": "Memory a task",
    "soak": "Memory over many requests",
}


def render(result: Mapping[str, Any]) -> str:
    """One result as markdown."""
    parts = [f"## {TITLES[result['experiment']]}", _setting(result)]
    if "samples" in result:
        parts.append(_memory(result))
        return "\n\n".join(parts) + "\n"
    systems = list(result["systems"])
    baseline = result["baseline"] or systems[-1]
    for metric in result["metrics"]:
        title = summary.METRICS[metric][0]
        digits: Callable[[float], str] = lambda value: f"{value:,.1f}" if value < 100 else f"{value:,.0f}"  # noqa: E731
        parts.append(_table(title, result["axes"], systems, summary.table(result, metric), digits))
        if metric in ("throughput", "ttft", "step") and len(systems) > 1:
            over = summary.ratios(result, metric, baseline)
            parts.append(_table(f"{title}: ratio over {baseline}", result["axes"], systems, over, "{:.2f}".format))
    if "read_bandwidth" in result:
        parts.append(_roofline(result))
    if result.get("agreement"):
        shares = ", ".join(f"{name} {share:.1%}" for name, share in result["agreement"].items())
        parts.append(f"Answers whose first four tokens are those of the first float32 system: {shares}.")
    return "\n\n".join(parts) + "\n"


def _setting(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores ({machine['cpu_capability']}), {machine.get('memory_gib')} GiB, "
        f"{machine['threads']} threads, {machine['date']}, commit {machine['commit']}, "
        f"load before {machine['load_before'][0]}."
    ]
    if "workload" in result:
        work = result["workload"]
        lines.append(f"{work['text']} text tokens, {work['new']} new ones; medians of {work['repeats']} paired runs.")
    hidden = ("start_seconds", "weight_bytes")
    for name, facts in result.get("systems", {}).items():
        lines.append(
            f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items() if key not in hidden) + "."
        )
    return "\n".join(lines)


def _table(
    title: str,
    axes: Iterable[str],
    systems: Iterable[str],
    values: Mapping[tuple[Any, ...], Mapping[str, float]],
    show: Callable[[float], str],
) -> str:
    axes, systems = list(axes), list(systems)
    lines = [f"**{title}**", "", _row([*axes, *systems]), _row(["---:"] * (len(axes) + len(systems)))]
    for point, each in values.items():
        lines.append(_row([*map(str, point), *(show(each[name]) if name in each else "-" for name in systems)]))
    return "\n".join(lines)


def _roofline(result: Mapping[str, Any]) -> str:
    bandwidth = result["read_bandwidth"]
    lines = [f"**Against {bandwidth / 1e9:.1f} GB/s measured read bandwidth**", ""]
    lines += [_row(["system", "weights, MB", "floor, ms", "ms a token", "share of the bandwidth"]), _row(["---"] * 5)]
    for steps in summary.table(result, "step").values():
        for name, step in steps.items():
            size = result["systems"][name].get("weight_bytes")
            if size is not None:
                floor = 1000 * size / bandwidth
                lines.append(_row([name, f"{size / 1e6:.0f}", f"{floor:.1f}", f"{step:.1f}", f"{floor / step:.0%}"]))
    return "\n".join(lines)


def _memory(result: Mapping[str, Any]) -> str:
    lines = [_row(["after", "RSS, MiB"]), _row(["---", "---:"])]
    lines += [_row([sample["after"], f"{sample['rss'] / 2**20:.1f}"]) for sample in result["samples"]]
    lines += ["", *(f"{name}: {value}" for name, value in result["figures"].items())]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(render(json.loads(Path(path).read_text(encoding="utf-8"))))
