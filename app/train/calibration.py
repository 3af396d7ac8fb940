"""Temperature scaling of a classifier, and how well calibrated one is (Guo et al. 2017, sections 2 and 4.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from app.errors import InvalidTrainingData
from app.manifest import Calibration

MIN_ROWS = 20  # with fewer, the one number that is fitted is mostly chance
LOWEST, HIGHEST = 0.05, 20.0
NUM_BINS = 15
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Binned:
    """Rows by how sure the model was of its answer: bin m has the confidences in (m / NUM_BINS, (m + 1) / NUM_BINS]."""

    bins: torch.Tensor  # [rows], 0 to NUM_BINS - 1
    confidence: torch.Tensor  # [rows], float64, probability of the likeliest label
    right: torch.Tensor  # [rows], float64, 1 where that was the target


@dataclass(frozen=True)
class Judged:
    """Scores of rows, and which label was right."""

    scores: torch.Tensor  # [rows, labels], float64, log-likelihoods
    targets: torch.Tensor  # [rows]
    rows: torch.Tensor  # [rows], where each stands among those that were given

    @classmethod
    def of(cls, scores: Sequence[Sequence[float]], targets: Sequence[str], labels: Sequence[str]) -> Judged:
        """Without rows whose target is no label, or is impossible to the model: no temperature mends those."""
        number = {label: i for i, label in enumerate(labels)}
        kept = [
            (i, row, number[target])
            for i, (row, target) in enumerate(zip(scores, targets, strict=True))
            if target in number and row[number[target]] > -math.inf
        ]
        table = torch.tensor([row for _, row, _ in kept], dtype=torch.float64).reshape(-1, len(labels))
        return cls(
            table,
            torch.tensor([target for _, _, target in kept], dtype=torch.long),
            torch.tensor([i for i, _, _ in kept], dtype=torch.long),
        )

    def __len__(self) -> int:
        return len(self.targets)

    def nll(self, temperature: float = 1.0) -> float:
        """Negative log-likelihood of the targets, nats per row."""
        found = (self.scores / temperature).log_softmax(dim=1).gather(1, self.targets[:, None])
        return -float(found.mean())

    def ece(self, temperature: float = 1.0) -> float:
        """Expected calibration error over bins of equal width: how far confidence is from accuracy, 0 to 1."""
        found = self.bins(temperature)
        gaps = torch.zeros(NUM_BINS, dtype=torch.float64).index_add(0, found.bins, found.right - found.confidence)
        return float(gaps.abs().sum() / len(self))

    def bins(self, temperature: float = 1.0) -> Binned:
        """The rows by their confidence, as a reliability diagram has them."""
        confidence, best = (self.scores / temperature).softmax(dim=1).max(dim=1)
        bins = (confidence * NUM_BINS).ceil().long().clamp(max=NUM_BINS) - 1  # ((m - 1) / M, m / M] is bin m - 1
        return Binned(bins, confidence, (best == self.targets).double())


def fit(judged: Judged) -> Calibration:
    """The temperature with the least negative log-likelihood on these rows, which must not be those of a test.

    Raises InvalidTrainingData where the rows cannot tell: too few of them, or the best would be none or boundless, as
    when all are right, or the scores say nothing about the targets.
    """
    if len(judged) < MIN_ROWS:
        raise InvalidTrainingData(f"{len(judged)} rows are too few to calibrate on, at least {MIN_ROWS} are needed")
    # In the inverse of the temperature it is convex, so in its logarithm there is one minimum.
    low, high = math.log(LOWEST), math.log(HIGHEST)
    best = math.exp(_golden_section(lambda x: judged.nll(math.exp(x)), low, high))
    if not LOWEST * 1.001 < best < HIGHEST / 1.001:
        right = (judged.scores.argmax(dim=1) == judged.targets).sum()
        raise InvalidTrainingData(
            f"{len(judged)} rows, {right} of them right, give no temperature between {LOWEST} and {HIGHEST}: "
            "where all are right less is always better, where the scores say nothing about the targets more is"
        )
    temperature = round(best, 4)
    return Calibration(
        temperature=temperature,
        rows=len(judged),
        nll_before=round(judged.nll(), 4),
        nll_after=round(judged.nll(temperature), 4),
        ece_before=round(judged.ece(), 4),
        ece_after=round(judged.ece(temperature), 4),
    )


def _golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-6) -> float:
    """The minimum of a function that has one between `low` and `high` (Kiefer 1953)."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left <= at_right:  # equal where both round to no loss at all
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = function(right)
    return (low + high) / 2
