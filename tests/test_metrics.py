"""Scores against hand-worked values, and against what scikit-learn 1.9.1, rouge-score 0.1.2 and sacrebleu give."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from app.train.calibration import Judged
from app.train.floors import constant, naive_bayes
from app.train.metrics import (
    Scorer,
    accuracy,
    bleu,
    calibration_error,
    chrf,
    field_f1,
    fields,
    has_fields,
    macro_f1,
    mean,
    rouge_l,
    value,
)

# accuracy_score, f1_score(average="macro") and confusion_matrix of scikit-learn for these; see test_evaluation.py too
TARGETS = "aaaaaaccbabaaaaccccaabbccabbbaaaccbacbccbabaaacaababaadaaaba"
ANSWERS = "acbabacababaccacdacaabbccabbcaaaacbabdccbcdbaacaabbbaadaabbc"


def counted(scorer: Scorer, *counts: int) -> float:
    return scorer(np.array(counts))


def test_accuracy() -> None:
    assert value(accuracy(["a", "b", "c", "d"], ["a", "b", "x", "y"]), 4) == 0.5
    assert value(accuracy(ANSWERS, TARGETS), 60) == pytest.approx(0.7)
    assert counted(accuracy(["a", "b"], ["a", "x"]), 3, 1) == 0.75, "a row that is drawn three times counts three times"
    assert counted(mean([1.0, 5.0]), 1, 3) == 4.0


@pytest.mark.parametrize(
    ("answers", "targets", "expected"),
    [
        (ANSWERS, TARGETS, 0.6235008595409041),
        ("abbbba", "aabbbc", 0.4523809523809524),  # c is never answered
        ("aabd", "aabb", 0.5555555555555555),  # d is never wanted
    ],
)
def test_macro_f1_is_scikit_learn_s(answers: str, targets: str, expected: float) -> None:
    assert value(macro_f1(answers, targets), len(targets)) == pytest.approx(expected, rel=1e-12)


def test_macro_f1_counts_labels_alike() -> None:
    # a: precision 1/2, recall 1 -> 2/3; b: precision 1, recall 1/2 -> 2/3; c never predicted -> 0
    scorer = macro_f1(["a", "a", "b", "a"], ["a", "b", "b", "c"])
    assert value(scorer, 4) == pytest.approx(((2 * 1 / 4) + (2 * 1 / 3) + 0) / 3)
    assert counted(scorer, 1, 1, 1, 0) == pytest.approx(2 / 3), "a label that was not drawn is not averaged"
    assert counted(scorer, 2, 0, 1, 0) == 1.0


@pytest.mark.parametrize(
    ("answer", "target", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("the dog sat down", "the cat sat", 2 * 2 / 7),
        ("sat cat the", "the cat sat", 2 * 1 / 6),  # order counts
        ("nothing", "the cat sat", 0.0),
        ("", "the cat sat", 0.0),
        # rouge_scorer.RougeScorer(["rougeL"]).score(target, answer)["rougeL"].fmeasure
        ("the cat was sat on a mat", "the cat sat on the mat", 0.7692307692307692),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("a QUICK brown dog fox", "A quick, brown fox!", 0.888888888888889),
        ("six five four three two one", "one two three four five six", 0.16666666666666666),
        ("street: Main St | number: 836", "number: 836 | street: Main St", 0.6),
    ],
)
def test_rouge_l(answer: str, target: str, expected: float) -> None:
    assert rouge_l(answer, target) == pytest.approx(expected, rel=1e-12)


HYPOTHESES = [
    "the cat was sat on a mat",
    "the gunman kill police",
    "a quick brown dog fox",
    "number: 836 | street: Main St",
    "",
]
REFERENCES = [
    ["the cat sat on the mat", "a cat was sitting on a mat"],
    ["police killed the gunman"],
    ["a quick brown fox", "the fast brown fox", "one brown fox"],
    ["street: Main St | number: 836"],
    ["something"],
]


def streams(references: list[list[str]]) -> list[list[str | None]]:
    return [[row[i] if i < len(row) else None for row in references] for i in range(max(map(len, references)))]


def test_bleu_and_chrf_are_sacrebleu_s() -> None:
    """Of a corpus, with as many references as each row has; and of any resample of it."""
    (ours_bleu, signature), (ours_chrf, _) = bleu(HYPOTHESES, REFERENCES), chrf(HYPOTHESES, REFERENCES)
    assert value(ours_bleu, 5) == pytest.approx(35.29379776589265, rel=1e-9)
    assert value(ours_chrf, 5) == pytest.approx(63.107317525237015, rel=1e-9)
    assert signature.startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp")
    generator = random.Random(0)
    for draw in range(20):
        rows = generator.choices(range(5), k=5) if draw else range(5)
        counts = [list(rows).count(i) for i in range(5)]
        hypotheses, references = [HYPOTHESES[i] for i in rows], [REFERENCES[i] for i in rows]
        for ours, oracle in ((ours_bleu, BLEU()), (ours_chrf, CHRF())):
            expected = oracle.corpus_score(hypotheses, streams(references)).score
            assert counted(ours, *counts) == pytest.approx(expected, rel=1e-12)
    one = [row[:1] for row in REFERENCES]
    assert value(chrf(HYPOTHESES, one)[0], 5) < value(ours_chrf, 5), "another right answer never lowers it"


def test_many_texts_that_end_in_a_full_stop_are_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    scorer, _ = bleu(["It rains today ."] * 150, [["It rains today ."]] * 150)
    assert value(scorer, 150) == pytest.approx(100.0) and not caplog.records


def test_fields_are_pairs() -> None:
    assert fields("number: 836 | street: Main St") == [("number", "836"), ("street", "Main St")]
    assert fields("time: 10:30") == [("time", "10:30")] and fields("a: | b") == [("a", "")]
    assert has_fields("a: | b: x") and has_fields("zip code: 1")
    for text in ("", "no fields", "a: 1 | b", "a: 1 |", ": 1", "a: 1 || b: 2"):
        assert not has_fields(text), text


def test_field_f1_is_micro() -> None:
    targets = ["a: 1 | b: 2 | c: 3", "a: 4"]
    # right: a: 1 and b: 2; given 2 + 2, wanted 3 + 1
    scorer = field_f1(["b: 2 | a: 1", "b: 4 | a: 5"], targets)
    assert scorer is not None and value(scorer, 2) == pytest.approx(2 * 2 / (4 + 4))
    assert counted(scorer, 2, 0) == pytest.approx(2 * 4 / (4 + 6))
    nonsense = field_f1(["I do not know", ""], targets)
    assert nonsense is not None and value(nonsense, 2) == 0.0
    repeated = field_f1(["a: 4 | a: 4 | a: 4"], ["a: 4"])
    assert repeated is not None and value(repeated, 1) == pytest.approx(2 * 1 / (3 + 1)), "said three times, right once"
    twice = field_f1(["a: 4 | a: 4"], ["a: 4 | a: 4"])
    assert twice is not None and value(twice, 1) == 1.0
    assert field_f1(["a: 1"] * 2, ["a: 1", "a title"]) is None, "one target of another form and there is no such score"


def test_the_calibration_error_of_a_resample_is_that_of_its_rows() -> None:
    generator = random.Random(3)
    labels = ["a", "b", "c"]
    table = [[generator.gauss(-3, 2) for _ in labels] for _ in range(40)]
    targets = [generator.choice([*labels, "none of them"]) for _ in table]
    table[5] = [-math.inf] * 3
    judged = Judged.of(table, targets, labels)
    assert 0 < len(judged) < 39
    for temperature in (1.0, 2.5):
        scorer = calibration_error(judged, temperature)
        assert value(scorer, 40) == pytest.approx(judged.ece(temperature), rel=1e-12)
        rows = generator.choices(range(40), k=40)
        drawn = Judged.of([table[i] for i in rows], [targets[i] for i in rows], labels)
        assert counted(scorer, *(rows.count(i) for i in range(40))) == pytest.approx(drawn.ece(temperature), rel=1e-12)
    assert counted(scorer, *(int(i == 5) for i in range(40))) == 0.0, "of no row that can tell"


def test_constant_is_the_most_frequent_target() -> None:
    assert constant(["x", "y", "y"], 2) == ["y", "y"]


def test_naive_bayes_follows_the_worked_example() -> None:
    """Manning, Raghavan & Schütze 2008, example 13.1: the China class wins, 0.0003 to 0.0001."""
    train = [
        ("Chinese Beijing Chinese", "china"),
        ("Chinese Chinese Shanghai", "china"),
        ("Chinese Macao", "china"),
        ("Tokyo Japan Chinese", "other"),
    ]
    assert naive_bayes(train, ["Chinese Chinese Chinese Tokyo Japan", "Tokyo Japan", "unseen"]) == [
        "china",
        "other",
        "china",
    ]
