"""The two drawings of a report, as SVG that stands in the page itself and takes its colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from app.train.evaluation import ReliabilityBin

LEFT, TOP, RIGHT, BOTTOM = 52, 12, 12, 40  # margins, in units of the drawing as all lengths here


@dataclass(frozen=True)
class Line:
    """Points (x, y) with finite numbers, in the order of x; `kind` is a class of the page's style sheet."""

    name: str
    kind: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Plot:
    """A rectangle with two linear axes."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        inner_width, inner_height = self.width - LEFT - RIGHT, self.height - TOP - BOTTOM
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return round(LEFT + across * inner_width, 2), round(TOP + (1 - up) * inner_height, 2)

    def axes(self, x_name: str, y_name: str) -> Iterator[str]:
        left, bottom = self.at(self.x[0], self.y[0])
        right, top = self.at(self.x[1], self.y[1])
        for tick in _ticks(*self.x):
            x, _ = self.at(tick, self.y[0])
            yield f'<text class="tick" x="{x}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>'
        for tick in _ticks(*self.y):
            _, y = self.at(self.x[0], tick)
            yield f'<line class="grid" x1="{left}" y1="{y}" x2="{right}" y2="{y}"/>'
            yield f'<text class="tick" x="{left - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>'
        yield f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>'
        middle = (left + right) / 2
        yield f'<text class="tick" x="{middle}" y="{self.height - 6}" text-anchor="middle">{escape(x_name)}</text>'
        y = (top + bottom) / 2
        turned = f'transform="rotate(-90 12 {y})" text-anchor="middle"'
        yield f'<text class="tick" x="12" y="{y + 4}" {turned}>{escape(y_name)}</text>'

    def svg(self, name: str, parts: Sequence[str]) -> str:
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
        return f'<svg {size} role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'


def line_chart(name: str, lines: Sequence[Line], *, x_name: str, y_name: str, mark: float | None = None) -> str:
    """`mark` is an x that a vertical line stands at. "" without points."""
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    plot = _Plot(640, 300, _range([x for x, _ in points]), _range([y for _, y in points]))
    parts = list(plot.axes(x_name, y_name))
    if mark is not None and plot.x[0] <= mark <= plot.x[1]:
        x, top = plot.at(mark, plot.y[1])
        _, bottom = plot.at(mark, plot.y[0])
        parts.append(f'<line class="mark" x1="{x}" y1="{top}" x2="{x}" y2="{bottom}"/>')
    for line in lines:
        places = [plot.at(x, y) for x, y in line.points]
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline class="line {line.kind}" points="{path}"/>')
        parts += [f'<circle class="{line.kind}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in places]
    return plot.svg(name, parts)


def reliability_diagram(bins: Sequence[ReliabilityBin]) -> str:
    """A bar for each bin, as high as its accuracy; a dot at its confidence, on the diagonal if it is right."""
    plot = _Plot(340, 340, (0.0, 1.0), (0.0, 1.0))
    parts = list(plot.axes("confidence", "accuracy"))
    for one in bins:
        left, top = plot.at(one.low, one.accuracy)
        right, bottom = plot.at(one.high, 0.0)
        told = f"{one.rows} rows: confidence {one.confidence:.4f}, accuracy {one.accuracy:.4f}"
        shape = f'x="{left}" y="{top}" width="{round(right - left - 1, 2)}" height="{round(bottom - top, 2)}"'
        parts.append(f'<rect class="bar" {shape}><title>{told}</title></rect>')
        x, y = plot.at(one.confidence, one.accuracy)
        parts.append(f'<circle class="validation" cx="{x}" cy="{y}" r="3"/>')
    (x1, y1), (x2, y2) = plot.at(0.0, 0.0), plot.at(1.0, 1.0)
    parts.append(f'<line class="mark" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')
    return plot.svg("Reliability diagram", parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """With room around a single value."""
    low, high = min(values), max(values)
    if high - low > 1e-12 * max(1.0, abs(high)):  # closer ones are one value, and have no ticks between them
        return low, high
    room = abs(low) / 2 or 1.0
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, four to ten of them."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]
