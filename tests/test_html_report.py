"""The page of an evaluation: well formed, complete, and nothing in it runs, loads or breaks out."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from app.train.data import Row
from app.train.evaluation import Evaluation, ReliabilityBin
from app.train.html_report import MAX_MATRIX, MAX_TEXT, MAX_WRONG, Report, render
from app.train.svg import Line, line_chart, reliability_diagram

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = [
    "<script>alert(1)</script>",
    "</td></table><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "<!-- --><style>*{display:none}</style>",
    "&lt;script&gt; &amp; &#60;b&#62;",
    "javascript:alert(1)",
    "]]><b>",
    "\u202etxt.exe\u2066",
    "nul \0 and \x1b[31m and \ufffe",
    "</title><h1>hi</h1>",
    "{{7*7}} ${7*7} %s {0}",
]
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "span", "div", "table", "tr", "th", "td"),
    *("svg", "text", "line", "path", "polyline", "circle", "rect"),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "style", "scope", "dir"),
    *("viewbox", "width", "height", "role", "aria-label", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "d"),
    *("points", "text-anchor", "transform"),
}


class Page(HTMLParser):
    """What a browser would see; fails at tags that do not match, and at whatever the renderer has no business with."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS and {name for name, _ in attributes} <= ATTRIBUTES, (tag, attributes)
        for name, value in attributes:
            if name == "style":
                assert re.fullmatch(r"--share: [01]\.\d{3}", value or "")
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    @property
    def text(self) -> str:
        return "".join(self.texts)


def spelt(text: str) -> str:
    """As the page shows it."""
    for unseen in ("\0", "\x1b", "\u202e", "\u2066", "\ufffe"):
        text = text.replace(unseen, unseen.encode("unicode_escape").decode())
    return text


def evaluation(answers: list[str], targets: list[str], labels: list[str] | None = None, **more: Any) -> Evaluation:
    rows = [Row(f"{target} in", target, f"<b>.jsonl:{i}") for i, target in enumerate(targets)]
    return Evaluation(name="mood:<b>7</b>", rows=rows, answers=answers, labels=labels, **more)


CURVE = [{"step": 10 * i, "train_loss": 3 / i, "validation_loss": 3.2 / i} for i in range(1, 8)]


def page(found: Evaluation, against: Evaluation | None = None, **more: Any) -> Page:
    wrong = found.wrong()
    records = found.records(wrong)
    if against is not None:
        records = [record | {"against": against.answers[record["row"] - 1]} for record in records]
        compared = {name: difference.as_dict() for name, difference in found.compare(against).items()}
        more |= {"against": against.summary(), "differences": compared}
    given = {"facts": {"Version": found.name}, "lineage": {"curve": CURVE, "best_step": 50}, **more}
    return Page(
        render(Report(title="a <title>", evaluation=found.summary(), wrong=records, num_wrong=len(wrong), **given))
    )


def test_hostile_text_stays_text() -> None:
    """As inputs, targets, answers, labels, names, files, facts and reasons."""
    scores = [[-float(i == j) for j in range(len(HOSTILE))] for i in range(len(HOSTILE))]
    found = evaluation(HOSTILE[1:] + HOSTILE[:1], HOSTILE, HOSTILE, label_scores=scores)
    gate = {"moved": False, "alias": HOSTILE[0], "reason": HOSTILE[1]}
    for shown in (
        page(found, evaluation(HOSTILE, HOSTILE, HOSTILE), facts=dict(zip(HOSTILE, HOSTILE, strict=True)), gate=gate),
        page(evaluation(HOSTILE[1:] + HOSTILE[:1], HOSTILE)),
    ):
        for text in HOSTILE:
            assert spelt(text) in shown.text, text
        assert "script" not in shown.tags and shown.tags.count("h1") == 1 and shown.tags.count("style") == 1
        assert "mood:<b>7</b>" in shown.text
    raw = render(Report(title=HOSTILE[0], facts={}, evaluation=found.summary()))
    assert not [text for text in HOSTILE if text[0] in "<\"'" and text in raw]
    assert not set(raw) & {"\0", "\x1b", "\u202e", "\u2066", "\ufffe"}
    assert "http:" not in raw and "https:" not in raw and "url(" not in raw and "@import" not in raw


def test_a_page_has_all_of_it() -> None:
    labels = ["neg", "pos"]
    scores = [[math.log(0.7), math.log(0.3)]] * 4
    found = evaluation(["neg"] * 4, ["neg", "pos", "neg", "pos"], labels, label_scores=scores, temperature=1.5)
    other = evaluation(["pos"] * 4, ["neg", "pos", "neg", "pos"], labels)
    gate = {"moved": True, "alias": "latest", "reason": "it is better"}
    shown = page(found, other, gate=gate)
    for told in ("Accuracy", "Macro-F1", "ECE, calibrated", "0.5000 [0.0000, 1.0000]", "Difference", "+0.0000 ["):
        assert told in shown.text, told
    for heading in ("Scores", "Gate", "Loss", "Confusion", "Reliability", "Wrong answers"):
        assert heading in shown.text, heading
    assert "The alias latest was moved: it is better." in shown.text and "2 of 2, the worst first" in shown.text
    assert shown.tags.count("svg") == 2 and shown.tags.count("polyline") == 2 and shown.tags.count("rect") == 1
    assert "the dashed line is the step that was kept: 50" in shown.text


def test_what_there_is_not_is_left_out() -> None:
    bare = Report(title="x", facts={}, evaluation={"name": "x:1", "rows": 2, "scores": {"accuracy": 1.0}})
    shown = Page(render(bare))
    assert "svg" not in shown.tags and "1.0000" in shown.text
    for heading in ("Gate", "Loss", "Confusion", "Reliability", "Wrong"):
        assert heading not in shown.text
    text = page(evaluation(["x y"], ["x y"]))
    assert "0 of 0" in text.text and "BLEU" in text.text and "nrefs:1" in text.text and "Confusion" not in text.text


@pytest.mark.parametrize(
    "curve",
    [
        None,
        "x",
        {},
        [],
        [None, 1, "x", []],
        [{"step": "1", "train_loss": 1.0}],
        [{"step": 1, "train_loss": math.nan, "validation_loss": math.inf}],
        [{"step": True, "train_loss": False}],
        [{"step": 10**400, "train_loss": 1.0}, {"step": 1e300, "train_loss": 1}],
        [{"step": "<script>", "train_loss": "<script>"}],
    ],
    ids=range(10),
)
def test_a_curve_that_is_none_is_not_drawn(curve: Any) -> None:
    """A manifest is what anybody uploads."""
    shown = page(evaluation(["x"], ["x"]), lineage={"curve": curve, "best_step": "<script>"})
    assert "Loss" not in shown.text and "script" not in shown.text


def test_a_curve_of_one_point_or_one_height_is_drawn() -> None:
    for curve in ([{"step": 5, "validation_loss": 0.0}], [{"step": i, "train_loss": 2.0} for i in range(3)]):
        shown = page(evaluation(["x"], ["x"]), lineage={"curve": curve})
        assert "Loss" in shown.text and "circle" in shown.tags


def test_many_labels_are_a_list_and_long_texts_are_cut() -> None:
    labels = [f"label {i}" for i in range(MAX_MATRIX + 1)]
    shown = page(evaluation(labels[1:] + labels[:1], labels, labels))
    assert f"{len(labels)} confusions among {len(labels)} labels" in shown.text and shown.tags.count("td") < 250
    long = page(evaluation(["y" * 5000], ["x"]))
    assert f"{'y' * MAX_TEXT} … (5000 characters)" in long.text and "y" * (MAX_TEXT + 1) not in long.text
    many = page(evaluation([f"{i}" for i in range(50)], ["x"] * 50))
    assert "20 of 50, the worst first" in many.text and many.text.count(".jsonl:") == MAX_WRONG


def numbers(svg: str, name: str) -> list[float]:
    return [float(found) for found in re.findall(rf' {name}="(-?[\d.]+)"', svg)]


def test_points_stand_where_they_belong() -> None:
    svg = line_chart("loss", [Line("a", "train", [(0, 4.0), (10, 2.0), (20, 3.0)])], x_name="x", y_name="y", mark=10)
    (x0, x1, x2), (y0, y1, y2) = numbers(svg, "cx"), numbers(svg, "cy")
    assert x0 < x1 < x2 and x1 - x0 == x2 - x1 and y0 < y2 < y1, "y grows downwards"
    assert y2 == pytest.approx((y0 + y1) / 2), "3 is half way from 2 to 4"
    assert f'class="mark" x1="{x1}"' in svg and ">15<" in svg and ">2.5<" in svg
    assert line_chart("loss", [Line("a", "train", [])], x_name="x", y_name="y") == ""


def test_a_right_bin_is_on_the_diagonal() -> None:
    bins = [ReliabilityBin(0.4, 0.6, 9, 0.5, 0.5), ReliabilityBin(0.8, 1.0, 3, 0.9, 0.2)]
    svg = reliability_diagram(bins)
    (x1, x2), (y1, y2) = numbers(svg, "cx"), numbers(svg, "cy")
    corner = re.search(r'class="mark" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"', svg)
    assert corner is not None
    left, bottom, right, top = map(float, corner.groups())
    assert (x1 - left) / (right - left) == pytest.approx((bottom - y1) / (bottom - top), abs=1e-3)
    assert (bottom - y2) / (bottom - top) == pytest.approx(0.2, abs=1e-3) and x2 > x1
    assert numbers(svg, "height")[-1] == pytest.approx(0.2 * (bottom - top), abs=0.02), "a bar is its accuracy"
