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
    "score": "Classification among 77 labels",
    "memory": "Memory a task",
    "soak": "Memory over many requests",
}

COMPARED = ("throughput", "ttft", "step", "input")  # as ratios


def render(result: Mapping[str, Any]) -> str:
    """One result as markdown."""
    parts = [f"## {TITLES[result['experiment']]}", _setting(result)]
    parts += [f"**NOT COMPARABLE: {problem}**" for problem in result.get("problems", [])]
    if "samples" in result:
        parts.append(_memory(result))
        return "\n\n".join(parts) + "\n"
    systems = list(result["systems"])
    baseline = result["baseline"] or systems[-1]
    for metric in result["metrics"]:
        title = summary.METRICS[metric][0]
        digits: Callable[[float], str] = lambda value: f"{value:,.1f}" if value < 100 else f"{value:,.0f}"  # noqa: E731
        parts.append(_table(title, result["axes"], systems, summary.table(result, metric), digits))
        if metric not in COMPARED:
            continue
        if len(systems) > 1:
            over = summary.ratios(result, metric, baseline)
            parts.append(_table(f"{title}: ratio over {baseline}", result["axes"], systems, over, "{:.2f}".format))
        if result.get("interleaved") and (over := summary.point_ratios(result, metric)):
            first = ", ".join(f"{axis} {value}" for axis, value in zip(result["axes"], next(iter(over)), strict=True))
            title += f": ratio over {first} in the same repeat"
            parts.append(_table(title, result["axes"], systems, over, "{:.3f}".format))
    if "read_bandwidth" in result:
        parts.append(_roofline(result))
    if result.get("agreement"):
        four = result.get("agreement_of_four", {})
        shares = ", ".join(
            f"{name} {share:.1%} ({four.get(name, 0):.1%})" for name, share in result["agreement"].items()
        )
        parts.append(f"Answers whose first token (first four) is that of the first float32 system: {shares}.")
    parts += _answers(result)
    if result.get("left_out"):
        parts.append("Left out: " + "; ".join(result["left_out"]) + ".")
    return "\n\n".join(parts) + "\n"


def _answers(result: Mapping[str, Any]) -> list[str]:
    """How the first answer begins over HTTP, where only texts come back: servers that do the same work say the same."""
    shown: dict[str, str] = {}
    for run in result["runs"]:
        if run.get("texts"):
            shown.setdefault(run["system"], f"{run['system']} ({run['tokens']} tokens): {run['texts'][0][:120]!r}")
    return ["The first answers over HTTP:\n\n" + "\n".join(f"- {line}" for line in shown.values())] if shown else []


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
