"""Scores of answers, each as a function of how often every row counts: all that resampling the rows changes.

A scorer reads the texts once, keeps what it needs of each row, and is asked a thousand times (Koehn 2004, section 3).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from app.train.calibration import Judged

Counts: TypeAlias = NDArray[np.int64]  # [rows], how often each counts; each once for the score itself
Scorer: TypeAlias = Callable[[Counts], float]

_WORD = re.compile(r"\w+")
_FIELD_NAME = re.compile(r"\w[\w .-]{0,63}")


def value(scorer: Scorer, rows: int) -> float:
    """The score itself: every row counts once."""
    return scorer(np.ones(rows, dtype=np.int64))


def mean(of_rows: Sequence[float]) -> Scorer:
    """Of a number that each row has."""
    values = np.array(of_rows, dtype=np.float64)
    return lambda counts: float(counts @ values / counts.sum())


def accuracy(answers: Sequence[str], targets: Sequence[str]) -> Scorer:
    """Share of answers equal to their target, 0 to 1; also called exact match."""
    return mean([answer == target for answer, target in zip(answers, targets, strict=True)])


def macro_f1(answers: Sequence[str], targets: Sequence[str]) -> Scorer:
    """F1 averaged over the labels that occur in either, each counting alike, 0 to 1."""
    number = {text: i for i, text in enumerate(dict.fromkeys([*targets, *answers]))}
    given = np.array([number[answer] for answer in answers])
    wanted = np.array([number[target] for target in targets])
    right = np.flatnonzero(given == wanted)

    def score(counts: Counts) -> float:
        occurrences = np.bincount(given, counts, len(number)) + np.bincount(wanted, counts, len(number))
        hits = np.bincount(wanted[right], counts[right], len(number))
        there = occurrences > 0  # in a resample a label may be missing
        return float((2 * hits[there] / occurrences[there]).mean())

    return score


def rouge_l(answer: str, target: str) -> float:
    """Of one row: F1 of the longest common subsequence of words, lower-cased, not stemmed, 0 to 1 (Lin 2004)."""
    a, b = words(answer), words(target)
    common = _longest_common_subsequence(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Scorer, str]:
    """Corpus BLEU, 0 to 100 (Papineni et al. 2002), and sacrebleu's signature of how it is computed (Post 2018).

    `references` are the right answers of each row, one or more.
    """
    from sacrebleu.metrics.bleu import BLEU  # a server that scores nothing needs neither its time nor its memory

    return _corpus_score(BLEU(force=True), answers, references)  # force: do not warn of texts that end in " ."


def chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Scorer, str]:
    """Corpus chrF2, 0 to 100 (Popović 2015), and sacrebleu's signature; of several references the nearest counts."""
    from sacrebleu.metrics.chrf import CHRF

    return _corpus_score(CHRF(), answers, references)


def field_f1(answers: Sequence[str], targets: Sequence[str]) -> Scorer | None:
    """Micro F1 over the `name: value` pairs of answers written `name: value | name: value`, 0 to 1.

    A pair is right if the target has the same one. None unless every target has that form. What of an answer has no
    such form is no pair.
    """
    if not all(has_fields(target) for target in targets):
        return None
    pairs = [(Counter(fields(a)), Counter(fields(b))) for a, b in zip(answers, targets, strict=True)]
    right = np.array([(given & wanted).total() for given, wanted in pairs])
    both = np.array([given.total() + wanted.total() for given, wanted in pairs])
    return lambda counts: float(2 * (counts @ right) / (counts @ both))


def has_fields(text: str) -> bool:
    """Whether all of it is `name: value | name: value`."""
    return len(fields(text)) == text.count("|") + 1


def fields(text: str) -> list[tuple[str, str]]:
    """The pairs of such a text; parts that are none are left out."""
    found = []
    for part in text.split("|"):
        name, colon, content = part.partition(":")
        if colon and _FIELD_NAME.fullmatch(name.strip()):
            found.append((name.strip(), content.strip()))
    return found


def calibration_error(judged: Judged, temperature: float = 1.0) -> Scorer:
    """Expected calibration error, 0 to 1: of the rows that `judged` has, as `Judged.ece` says."""
    found = judged.bins(temperature)
    rows, bins = judged.rows.numpy(), found.bins.numpy()
    gaps = (found.right - found.confidence).numpy()

    def score(counts: Counts) -> float:
        taken = counts[rows]
        return float(np.abs(np.bincount(bins, gaps * taken)).sum() / max(1, taken.sum()))

    return score


def words(text: str) -> list[str]:
    """Lower-cased."""
    return _WORD.findall(text.lower())


def _corpus_score(metric: Any, answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Scorer, str]:
    """By sacrebleu's statistics of each row, whose sums give its score, as its own significance tests do."""
    most = max(map(len, references))
    streams = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    statistics = np.array(metric._extract_corpus_statistics(list(answers), streams), dtype=np.int64)
    signature = str(metric.get_signature())

    def score(counts: Counts) -> float:
        return float(metric._compute_score_from_stats((counts @ statistics).tolist()).score)

    return score, signature


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
