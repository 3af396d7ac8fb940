"""What one version answered to rows, how good that is and how surely; and two versions on the same rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from app.train import metrics
from app.train.bootstrap import Interval, difference, intervals
from app.train.calibration import NUM_BINS, Judged
from app.train.data import Row
from app.train.metrics import Scorer

DIGITS = 4
_UPPER_BOUNDS = {"bleu": 100.0, "chrf": 100.0}  # of the others 1
_BASIC = ("ece", "ece_calibrated")


@dataclass(frozen=True)
class Confusion:
    """How often a target was given which answer. None stands for every text that is no label, if there is one."""

    labels: list[str | None]
    counts: list[list[int]]  # [targets][answers], both in the order of `labels`


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows whose confidence lies in (low, high], and how it and the accuracy are on average."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Difference:
    """Of a score on the same rows, the first less the second, with its 95 % interval (paired bootstrap)."""

    difference: float
    interval: Interval

    def as_dict(self) -> dict[str, Any]:
        """Rounded, ready for JSON."""
        return {"difference": round(self.difference, DIGITS), "interval": _rounded(self.interval)}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Answers of one version to rows. `labels` are those that it chose from; None where it generated text.

    `label_scores` are the log-likelihoods of each row's labels, if they are known; probabilities are those at
    `temperature`, of a version that is calibrated.
    """

    name: str  # a reference, or the base model's
    rows: Sequence[Row]
    answers: Sequence[str]
    labels: Sequence[str] | None = None
    label_scores: Sequence[Sequence[float]] | None = None
    temperature: float | None = None
    is_classified: bool | None = None  # how it is scored; None: as its answers were made

    @property
    def scored_as_labels(self) -> bool:
        return self.labels is not None if self.is_classified is None else self.is_classified

    @cached_property
    def judged(self) -> Judged | None:
        """For calibration: None for text, and where no row's target is among the labels."""
        if self.labels is None or self.label_scores is None or not self.scored_as_labels:
            return None
        found = Judged.of(self.label_scores, self._targets, self.labels)
        return found if len(found) else None

    @cached_property
    def _scorers(self) -> dict[str, Scorer]:
        """Accuracy, macro-F1 and calibration of labels; exact match, ROUGE-L, BLEU, chrF and fields of text."""
        return self._scorers_of_labels() if self.scored_as_labels else self._scorers_of_text()

    def _scorers_of_labels(self) -> dict[str, Scorer]:
        scorers = {
            "accuracy": metrics.accuracy(self.answers, self._targets),
            "macro_f1": metrics.macro_f1(self.answers, self._targets),
        }
        if self.judged is not None:
            scorers["ece"] = metrics.calibration_error(self.judged)
            if self.temperature is not None:
                scorers["ece_calibrated"] = metrics.calibration_error(self.judged, self.temperature)
        return scorers

    def _scorers_of_text(self) -> dict[str, Scorer]:
        scorers = {
            "exact_match": metrics.accuracy(self.answers, self._targets),
            "rouge_l": metrics.mean(self._rouge_l),
            **{name: scorer for name, (scorer, _) in self._corpus_scorers.items()},
        }
        if (fields := metrics.field_f1(self.answers, self._targets)) is not None:
            scorers["field_f1"] = fields
        return scorers

    @cached_property
    def _corpus_scorers(self) -> dict[str, tuple[Scorer, str]]:
        """With sacrebleu's signatures."""
        references = [(row.target, *row.references) for row in self.rows]
        return {"bleu": metrics.bleu(self.answers, references), "chrf": metrics.chrf(self.answers, references)}

    @cached_property
    def scores(self) -> dict[str, float]:
        """By name, each from 0 to 1, BLEU and chrF from 0 to 100; of labels `accuracy` first, of text `exact_match`."""
        return {name: round(metrics.value(scorer, len(self.rows)), DIGITS) for name, scorer in self._scorers.items()}

    def intervals(self, seed: int = 0) -> dict[str, Interval]:
        """The 95 % interval of each score. Takes up to seconds."""
        found = intervals(self._scorers, len(self.rows), seed=seed, basic=_BASIC)
        return {
            name: _rounded((max(0.0, low), min(_UPPER_BOUNDS.get(name, 1.0), high)))
            for name, (low, high) in found.items()
        }

    def compare(self, other: Evaluation, *, seed: int = 0, only: Collection[str] = ()) -> dict[str, Difference]:
        """This less `other`, in every score that both have, or those of `only`; `other` is scored as this one is.

        Raises ValueError if they did not answer the same rows.
        """
        if list(self.rows) != list(other.rows):
            raise ValueError("only answers to the same rows can be compared")
        theirs = other.scored_as(self)._scorers
        paired = {
            name: difference(scorer, theirs[name])
            for name, scorer in self._scorers.items()
            if name in theirs and (not only or name in only)
        }
        found = intervals(paired, len(self.rows), seed=seed, basic=_BASIC)
        return {name: Difference(metrics.value(scorer, len(self.rows)), found[name]) for name, scorer in paired.items()}

    def scored_as(self, other: Evaluation) -> Evaluation:
        """By the scores that `other` has, so that a classifier can be held against a version that generates."""
        return replace(self, is_classified=other.scored_as_labels)

    def confusion(self) -> Confusion | None:
        """None for text."""
        if not self.scored_as_labels:
            return None
        labels = list(self.labels if self.labels is not None else dict.fromkeys(self._targets))
        number = {label: i for i, label in enumerate(labels)}
        pairs = Counter(
            (number.get(target, len(labels)), number.get(answer, len(labels)))
            for target, answer in zip(self._targets, self.answers, strict=True)
        )
        has_others = any(len(labels) in pair for pair in pairs)
        size = len(labels) + has_others
        counts = [[pairs[target, answer] for answer in range(size)] for target in range(size)]
        return Confusion([*labels, None] if has_others else list(labels), counts)

    def reliability(self) -> list[ReliabilityBin]:
        """Of the probabilities that are served: at the version's temperature. Bins without rows are left out."""
        if self.judged is None:
            return []
        found = self.judged.bins(self.temperature or 1.0)
        bins = []
        for i in range(NUM_BINS):
            inside = found.bins == i
            if rows := int(inside.sum()):
                confidence, right = (round(float(t[inside].mean()), DIGITS) for t in (found.confidence, found.right))
                bins.append(ReliabilityBin(i / NUM_BINS, (i + 1) / NUM_BINS, rows, confidence, right))
        return bins

    @cached_property
    def _probabilities(self) -> torch.Tensor | None:
        """[rows, labels], as /v1/classify gives them: where every label is impossible none is likelier than another."""
        if self.labels is None or self.label_scores is None:
            return None
        table = torch.tensor(self.label_scores, dtype=torch.float64) / (self.temperature or 1.0)
        return table.softmax(dim=1).nan_to_num(nan=1 / len(self.labels))

    def wrong(self) -> list[int]:
        """Rows with another answer than their target, the worst first: the surest label, the text least alike."""
        table = self._probabilities
        badness = [-score for score in self._rouge_l] if table is None else table.amax(dim=1).tolist()
        numbers = [i for i, (a, t) in enumerate(zip(self.answers, self._targets, strict=True)) if a != t]
        return sorted(numbers, key=lambda i: (-badness[i], i))

    def records(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Rows with what was answered, ready for JSON."""
        return [self._record(i) for i in numbers]

    def _record(self, i: int) -> dict[str, Any]:
        row, answer = self.rows[i], self.answers[i]
        found: dict[str, Any] = {"row": i + 1, "source": row.source, "input": row.input, "target": row.target}
        if row.references:
            found["references"] = list(row.references)
        found |= {"answer": answer, "right": answer == row.target}
        if self.labels is not None and self._probabilities is not None:
            return found | {"probabilities": dict(zip(self.labels, self._probabilities[i].tolist(), strict=True))}
        return found | {"rouge_l": round(self._rouge_l[i], DIGITS)}

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """All but the rows, ready for JSON."""
        found: dict[str, Any] = {"name": self.name, "rows": len(self.rows), "scores": self.scores}
        found["intervals"] = self.intervals(seed)
        confusion = self.confusion()
        if confusion is not None:
            found["confusion"] = asdict(confusion)
        else:
            found["signatures"] = {name: signature for name, (_, signature) in self._corpus_scorers.items()}
        if bins := self.reliability():
            found["reliability"] = [asdict(one) for one in bins]
        return found

    @cached_property
    def _rouge_l(self) -> list[float]:
        return [metrics.rouge_l(answer, row.target) for answer, row in zip(self.answers, self.rows, strict=True)]

    @cached_property
    def _targets(self) -> list[str]:
        return [row.target for row in self.rows]


def _rounded(interval: Interval) -> Interval:
    low, high = (round(bound, DIGITS) for bound in interval)
    return low, high
