"""Scores of predictions, and what can be had without any language model: the floors."""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def accuracy(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Share of predictions equal to their target; also called exact match."""
    return sum(p == t for p, t in zip(predictions, targets, strict=True)) / len(targets)


def macro_f1(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """F1 averaged over the labels that occur in either, each counting alike."""
    hits, predicted, actual = Counter[str](), Counter(predictions), Counter(targets)
    hits.update(t for p, t in zip(predictions, targets, strict=True) if p == t)
    labels = predicted.keys() | actual.keys()
    return sum(2 * hits[label] / (predicted[label] + actual[label]) for label in labels) / len(labels)


def rouge_l(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Mean F1 of the longest common subsequence of words, lower-cased (ROUGE-L; Lin 2004)."""

    def one(prediction: str, target: str) -> float:
        a, b = _WORD.findall(prediction.lower()), _WORD.findall(target.lower())
        common = _longest_common_subsequence(a, b)
        return 2 * common / (len(a) + len(b)) if common else 0.0

    return sum(one(p, t) for p, t in zip(predictions, targets, strict=True)) / len(targets)


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def constant(train_targets: Sequence[str], count: int) -> list[str]:
    """The most frequent training target, for every row: the majority class, or the best constant answer."""
    return [Counter(train_targets).most_common(1)[0][0]] * count


def naive_bayes(train: Sequence[tuple[str, str]], inputs: Sequence[str]) -> list[str]:
    """Multinomial naive Bayes over lower-cased words with Laplace smoothing (Manning et al. 2008, 13.2).

    `train` holds (input, label) pairs.
    """
    words: dict[str, Counter[str]] = defaultdict(Counter)
    for text, label in train:
        words[label].update(_WORD.findall(text.lower()))
    priors = Counter(label for _, label in train)
    vocabulary = set[str]().union(*words.values())
    totals = {label: sum(counts.values()) + len(vocabulary) for label, counts in words.items()}

    def predict(text: str) -> str:
        known = [word for word in _WORD.findall(text.lower()) if word in vocabulary]
        return max(
            priors,
            key=lambda label: (
                math.log(priors[label] / len(train))
                + sum(math.log((words[label][word] + 1) / totals[label]) for word in known)
            ),
        )

    return [predict(text) for text in inputs]


def paired_interval(
    differences: Sequence[float], *, seed: int = 0, resamples: int = 1_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-row differences (Efron & Tibshirani 1993, section 13.3)."""
    generator = random.Random(f"bootstrap {seed}")
    count = len(differences)
    means = sorted(math.fsum(generator.choices(differences, k=count)) / count for _ in range(resamples))
    tail = (1 - level) / 2
    return means[int(tail * resamples)], means[min(resamples - 1, int((1 - tail) * resamples))]
