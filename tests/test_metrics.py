"""Scores against hand-worked values."""

from __future__ import annotations

import pytest

from app.train.metrics import accuracy, constant, macro_f1, naive_bayes, rouge_l


def test_accuracy() -> None:
    assert accuracy(["a", "b", "c", "d"], ["a", "b", "x", "y"]) == 0.5


def test_macro_f1_counts_labels_alike() -> None:
    # a: precision 1/2, recall 1 -> 2/3; b: precision 1, recall 1/2 -> 2/3; c never predicted -> 0
    assert macro_f1(["a", "a", "b", "a"], ["a", "b", "b", "c"]) == pytest.approx(((2 * 1 / 4) + (2 * 1 / 3) + 0) / 3)


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("the dog sat down", "the cat sat", 2 * 2 / 7),
        ("sat cat the", "the cat sat", 2 * 1 / 6),  # order counts
        ("nothing", "the cat sat", 0.0),
        ("", "the cat sat", 0.0),
    ],
)
def test_rouge_l(prediction: str, target: str, expected: float) -> None:
    assert rouge_l([prediction], [target]) == pytest.approx(expected)


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
