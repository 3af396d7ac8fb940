"""An evaluation as one HTML page: no script, nothing fetched, and no text of others that is not escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from app.train.evaluation import ReliabilityBin
from app.train.svg import Line, line_chart, reliability_diagram

MAX_WRONG = 20  # rows that are shown
MAX_TEXT = 2_000  # characters of a text that are shown
MAX_MATRIX = 25  # labels; of more the commonest confusions are listed
MAX_PAIRS = 30
# What may be loaded, run or sent from the page: nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
NAMES = {
    "accuracy": "Accuracy",
    "macro_f1": "Macro-F1",
    "ece": "ECE",
    "ece_calibrated": "ECE, calibrated",
    "exact_match": "Exact match",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF2",
    "field_f1": "Field F1",
}
# Control characters, which HTML has not, and those that turn the direction of what is around them.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]"
)
_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1f; --dim: #5e5e66; --page: #fff; --rule: #d8d8de; --a: #2563c9;
  --b: #b4540a; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8ec; --dim: #a0a0aa; --page: #16161a; --rule: #3a3a42;
  --a: #7fb0ff; --b: #f2a65a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.dim { color: var(--dim); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--rule);
  text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 8rem; }
td.cell { background: color-mix(in srgb, var(--a) calc(var(--share) * 60%), transparent); }
svg { max-width: 100%; height: auto; } .tick { font-size: 11px; fill: var(--dim); }
.grid { stroke: var(--rule); } .axis { stroke: var(--dim); fill: none; }
.mark { stroke: var(--dim); stroke-dasharray: 4 4; } .line { fill: none; stroke-width: 1.5; }
.line.train { stroke: var(--a); } .line.validation { stroke: var(--b); } circle.train { fill: var(--a); }
circle.validation { fill: var(--b); } .bar { fill: var(--a); opacity: .45; }
.key-train { color: var(--a); } .key-validation { color: var(--b); }
"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page shows. Texts may be anybody's; `evaluation` and `against` are from `Evaluation.summary`."""

    title: str
    facts: Mapping[str, object]  # what was evaluated, and on what
    evaluation: Mapping[str, Any]
    against: Mapping[str, Any] | None = None
    differences: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)  # of the version: its `curve` and `best_step`, if any
    gate: Mapping[str, Any] | None = None
    wrong: Sequence[Mapping[str, Any]] | None = None  # the worst rows first; None: rows were not kept
    num_wrong: int = 0


def render(report: Report) -> str:
    """The page, in UTF-8."""
    parts = [
        *_head(report),
        *_scores(report),
        *_gate(report.gate),
        *_curve(report.lineage),
        *_confusion(report.evaluation.get("confusion")),
        *_reliability(report.evaluation.get("reliability")),
        *_wrong(report),
    ]
    return "\n".join([*parts, "</body>", "</html>", ""])


def _head(report: Report) -> Iterator[str]:
    title = text(report.title)
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<table>"
    for name, found in report.facts.items():
        yield f'<tr><th scope="row">{text(name)}</th><td class="text">{text(found)}</td></tr>'
    yield "</table>"


def _scores(report: Report) -> Iterator[str]:
    mine, theirs = report.evaluation, report.against
    yield f'<h2>Scores</h2>\n<p class="dim">{text(mine["rows"])} rows; in brackets the 95 % bootstrap interval.</p>'
    columns = [mine["name"], *([theirs["name"], "Difference"] if theirs is not None else [])]
    heads = "".join(f'<th class="number" scope="col">{text(column)}</th>' for column in columns)
    yield f'<div class="scroll"><table>\n<tr><th scope="col">Score</th>{heads}</tr>'
    for name in mine["scores"]:
        cells = [_score(mine, name)]
        if theirs is not None:
            found = report.differences.get(name)
            cells += [_score(theirs, name), _number(found["difference"], found["interval"], "+") if found else ""]
        row = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        yield f'<tr><th scope="row">{text(NAMES.get(name, name))}</th>{row}</tr>'
    yield "</table></div>"
    if signatures := mine.get("signatures"):
        told = "; ".join(f"{NAMES.get(name, name)} {signature}" for name, signature in signatures.items())
        yield f'<p class="dim">{text(told)}</p>'


def _score(evaluation: Mapping[str, Any], name: str) -> str:
    scores, intervals = evaluation["scores"], evaluation.get("intervals", {})
    return _number(scores[name], intervals.get(name)) if name in scores else ""


def _number(number: float, interval: Sequence[float] | None, sign: str = "") -> str:
    shown = f"{number:{sign}.4f}"
    return shown if interval is None else f"{shown} [{interval[0]:{sign}.4f}, {interval[1]:{sign}.4f}]"


def _gate(gate: Mapping[str, Any] | None) -> Iterator[str]:
    if gate is None:
        return
    verb = "was moved" if gate["moved"] else "was not moved"
    yield f"<h2>Gate</h2>\n<p>The alias {text(gate['alias'])} {verb}: {text(gate['reason'])}.</p>"


def _curve(lineage: Mapping[str, Any]) -> Iterator[str]:
    train, validation = (_points(lineage.get("curve"), name) for name in ("train_loss", "validation_loss"))
    best = _finite(lineage.get("best_step"))
    lines = [Line("training", "train", train), Line("validation", "validation", validation)]
    drawn = line_chart("Loss by step", lines, x_name="step", y_name="loss, nats per token", mark=best)
    if not drawn:
        return
    yield '<h2>Loss</h2>\n<p><span class="key-train">● training</span> <span class="key-validation">● validation</span>'
    if best is not None:
        yield f'<span class="dim">the dashed line is the step that was kept: {best:g}</span>'
    yield "</p>"
    yield drawn


def _points(curve: object, name: str) -> list[tuple[float, float]]:
    """What can be drawn of a manifest that anybody may have written."""
    found = []
    for point in curve if isinstance(curve, list) else []:
        if isinstance(point, Mapping):
            x, y = _finite(point.get("step")), _finite(point.get(name))
            if x is not None and y is not None:
                found.append((x, y))
    return sorted(found)


def _finite(number: object) -> float | None:
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < 1e15:
        return None
    return float(number) if math.isfinite(number) else None


def _confusion(confusion: Mapping[str, Any] | None) -> Iterator[str]:
    if confusion is None:
        return
    names = ["(no label)" if label is None else label for label in confusion["labels"]]
    counts = confusion["counts"]
    yield "<h2>Confusion</h2>"
    if len(names) > MAX_MATRIX:
        yield from _confusions(names, counts)
        return
    yield '<p class="dim">A row for each target, a column for each answer.</p>\n<div class="scroll"><table>'
    yield f"<tr><td></td>{''.join(f'<th scope=col class=number>{text(name)}</th>' for name in names)}</tr>"
    for name, row in zip(names, counts, strict=True):
        total = sum(row) or 1
        cells = "".join(f'<td class="number cell" style="--share: {n / total:.3f}">{n}</td>' for n in row)
        yield f'<tr><th scope="row">{text(name)}</th>{cells}</tr>'
    yield "</table></div>"


def _confusions(names: Sequence[str], counts: Sequence[Sequence[int]]) -> Iterator[str]:
    pairs = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j]
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    yield f'<p class="dim">The commonest of {len(pairs)} confusions among {len(names)} labels.</p>\n<table>'
    yield '<tr><th scope="col">Target</th><th scope="col">Answer</th><th class="number" scope="col">Rows</th></tr>'
    for n, i, j in pairs[:MAX_PAIRS]:
        yield f'<tr><td class="text">{text(names[i])}</td><td class="text">{text(names[j])}</td>'
        yield f'<td class="number">{n}</td></tr>'
    yield "</table>"


def _reliability(bins: Sequence[Mapping[str, Any]] | None) -> Iterator[str]:
    if not bins:
        return
    yield '<h2>Reliability</h2>\n<p class="dim">Bars: accuracy of the rows in a bin; dots: their mean confidence.</p>'
    yield reliability_diagram([ReliabilityBin(**one) for one in bins])


def _wrong(report: Report) -> Iterator[str]:
    if report.wrong is None:
        return
    shown = report.wrong[:MAX_WRONG]
    yield f'<h2>Wrong answers</h2>\n<p class="dim">{len(shown)} of {report.num_wrong}, the worst first.</p>'
    if not shown:
        return
    columns = ["Row", "Input", "Target", "Answer", *(["The other's"] if "against" in shown[0] else [])]
    yield '<div class="scroll"><table>'
    yield f"<tr>{''.join(f'<th scope=col>{text(column)}</th>' for column in columns)}</tr>"
    for row in shown:
        given = " / ".join([row["target"], *row.get("references", ())])
        texts = [row["source"] or row["row"], row["input"], given, row["answer"]]
        texts += [row["against"]] if "against" in row else []
        yield f"<tr>{''.join(f'<td class=text dir=auto>{text(one)}</td>' for one in texts)}</tr>"
    yield "</table></div>"


def text(found: object) -> str:
    """Of anybody, for an element or an attribute: cut, and with what cannot be seen spelt out."""
    whole = str(found)
    cut = whole if len(whole) <= MAX_TEXT else f"{whole[:MAX_TEXT]} … ({len(whole)} characters)"
    return escape(_UNSEEN.sub(lambda match: match[0].encode("unicode_escape", "backslashreplace").decode(), cut))
