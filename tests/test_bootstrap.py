"""Intervals against what theory and sacrebleu's own paired test say."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from app.train.bootstrap import RESAMPLES, difference, intervals, resample
from app.train.calibration import Judged
from app.train.metrics import accuracy, bleu, calibration_error, macro_f1, mean, value


def test_the_interval_is_that_of_the_mean() -> None:
    """Of 400 numbers of standard deviation 1 it is about 1.96 / 20 wide to each side."""
    scorers = {"x": mean([1.0, -1.0] * 200)}
    low, high = intervals(scorers, 400)["x"]
    assert low == pytest.approx(-0.098, abs=0.02) and high == pytest.approx(0.098, abs=0.02)
    assert intervals(scorers, 400)["x"] == (low, high) != intervals(scorers, 400, seed=1)["x"]
    assert intervals({"x": mean([0.25] * 7)}, 7)["x"] == (0.25, 0.25)


def test_each_resample_has_as_many_rows_as_there_are() -> None:
    drawn = list(resample(7, 0))
    assert len(drawn) == RESAMPLES and {int(counts.sum()) for counts in drawn} == {7}
    assert np.mean([counts == 0 for counts in drawn]) == pytest.approx((1 - 1 / 7) ** 7, abs=0.02), "with replacement"


def test_95_of_100_intervals_hold_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an accuracy of 0.8 in samples of 100 rows; binomial, so 95 % of 200 samples is 190 with a deviation of 3."""
    monkeypatch.setattr("app.train.bootstrap.RESAMPLES", 200)
    generator = random.Random(0)
    held = 0
    for sample in range(200):
        low, high = intervals({"x": mean([generator.random() < 0.8 for _ in range(100)])}, 100, seed=sample)["x"]
        held += low <= 0.8 <= high
    assert 180 <= held <= 198


def test_a_difference_is_paired() -> None:
    """One that is right where another is, and of one row in twenty more, is surely better; alone they look alike."""
    old = [i % 2 == 0 for i in range(200)]
    new = [right or i % 20 == 1 for i, right in enumerate(old)]
    alone = intervals({"old": mean(old), "new": mean(new)}, 200)
    assert alone["old"][1] > alone["new"][0], "they overlap"
    low, high = intervals({"x": difference(mean(new), mean(old))}, 200)["x"]
    assert 0 < low < 0.05 < high
    assert intervals({"x": difference(mean(old), mean(old))}, 200)["x"] == (0.0, 0.0)


def test_bleu_is_resampled_as_a_corpus() -> None:
    """As sacrebleu's own bootstrap has it (Koehn 2004): its mean and half width, within what the draws differ by."""
    from sacrebleu.metrics import BLEU

    generator = random.Random(1)
    words = "the a cat dog sat ran on under mat tree and then".split()
    references = [generator.choices(words, k=12) for _ in range(80)]
    answers = [[w if generator.random() < 0.7 else generator.choice(words) for w in row] for row in references]
    texts, right = [" ".join(row) for row in answers], [" ".join(row) for row in references]
    oracle = BLEU().corpus_score(texts, [right], n_bootstrap=1000)
    scorer, _ = bleu(texts, [[row] for row in right])
    low, high = intervals({"x": scorer}, 80)["x"]
    assert (low + high) / 2 == pytest.approx(oracle._mean, abs=0.5)
    assert (high - low) / 2 == pytest.approx(oracle._ci, rel=0.15)


def test_macro_f1_of_resamples_is_not_a_mean_of_rows() -> None:
    targets = "a" * 95 + "b" * 5
    scorer = macro_f1("a" * 97 + "b" * 3, targets)
    low, high = intervals({"x": scorer}, 100)["x"]
    assert low < 0.65 < value(scorer, 100) < high and high - low > 0.25, "five rows of a label make it unsure"
    low, high = intervals({"x": accuracy("a" * 97 + "b" * 3, targets)}, 100)["x"]
    assert high - low < 0.08


def test_the_interval_of_a_calibration_error_holds_what_resampling_adds() -> None:
    """Of a model whose probabilities are right: every resample looks worse than the rows, and the rows than it is."""
    generator = random.Random(5)
    labels = ["0", "1"]
    table = [[generator.gauss(0, 2), 0.0] for _ in range(300)]
    chances = [1 / (1 + math.exp(-row[0])) for row in table]
    targets = ["0" if generator.random() < chance else "1" for chance in chances]
    scorers = {"x": calibration_error(Judged.of(table, targets, labels))}
    plain, basic = (intervals(scorers, 300, basic=names)["x"] for names in ((), ("x",)))
    centre = value(scorers["x"], 300)
    assert basic == pytest.approx((2 * centre - plain[1], 2 * centre - plain[0]))
    assert plain[0] > 0.02 > basic[0], "by percentiles it would leave out the truth, which is none"
