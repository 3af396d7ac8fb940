"""`python -m benchmarks.plot throughput.json plot.png`: a panel for each length of the prompt. Needs matplotlib."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from benchmarks import summary

OURS, GREY = "#0b6e4f", "#d9dcde"
# Ours in one hue, peers in colours that stay apart for colour-blind readers (Okabe & Ito 2008).
COLOURS = {
    "ours-fp32": OURS,
    "ours-int8": "#46b08c",
    "http-ours-fp32": OURS,
    "http-ours-int8": "#46b08c",
    "vllm": "#d55e00",
    "http-vllm": "#d55e00",
    "llama.cpp": "#0072b2",
    "transformers": "#cc79a7",
    "peft": "#7a7a7a",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--metric", choices=summary.METRICS, default="throughput")
    arguments = parser.parse_args()
    draw(json.loads(arguments.result.read_text(encoding="utf-8")), arguments.metric, arguments.image)


def draw(result: dict[str, Any], metric: str, image: Path) -> None:
    """The last axis of the result goes along x; every combination of the others gets a panel."""
    values = summary.table(result, metric)
    *panel_axes, x_axis = result["axes"] if result["axes"][-1] != "prompt" else reversed(result["axes"])
    order = [result["axes"].index(axis) for axis in (*panel_axes, x_axis)]
    panels: dict[tuple[Any, ...], dict[Any, dict[str, float]]] = {}
    for point, systems in values.items():
        *panel, x = (point[place] for place in order)
        panels.setdefault(tuple(panel), {})[x] = systems
    xs = sorted({x for lines in panels.values() for x in lines})
    top = 1.08 * max(value for systems in values.values() for value in systems.values())
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(1 + 4.6 * len(panels), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for place, (key, lines) in zip(axes[0], panels.items(), strict=True):
        _panel(place, lines, list(result["systems"]), xs, top)
        title = ", ".join(f"{axis} {value}" for axis, value in zip(panel_axes, key, strict=True))
        place.set_title(title, fontsize=10, loc="left")
        place.set_xlabel(x_axis)
    axes[0][0].set_ylabel(summary.METRICS[metric][0])
    figure.savefig(image, dpi=160)


def _panel(place: Any, lines: dict[Any, dict[str, float]], systems: list[str], xs: list[Any], top: float) -> None:
    ends: list[tuple[float, str]] = []
    for name in systems:
        points = [(position, lines[x][name]) for position, x in enumerate(xs) if name in lines.get(x, {})]
        if points:
            width = 2.2 if "ours" in name else 1.4
            place.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=width, color=COLOURS[name])
            ends.append((points[-1][1], name))
    place.set_xticks(range(len(xs)), [str(x) for x in xs])  # evenly spaced: 1, 8, 32 and 64 rows matter alike
    place.set_xlim(-0.1 * len(xs), 1.28 * len(xs) - 1)  # room for the names
    place.set_ylim(0, top)
    below = -top
    for value, name in sorted(ends):  # names at the ends of their lines, pushed apart where they would overlap
        below = max(value, below + 0.055 * top)
        place.annotate(name, (len(xs) - 1, below), (6, 0), textcoords="offset points", va="center", fontsize=8,
                       color=COLOURS[name])  # fmt: skip
    place.grid(axis="y", color=GREY, linewidth=0.6)
    place.spines[["top", "right", "left"]].set_visible(False)
    place.tick_params(length=0)


if __name__ == "__main__":
    main()
