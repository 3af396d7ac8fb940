"""Whether a new version may take an alias over: only if it beats the one that has it, on the same rows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from app.train.evaluation import Evaluation
from app.train.metrics import rouge_l

MAX_CHANCE = 0.025  # one-sided, as the bounds of a 95 % interval are


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of the alias, and why. Scores are means over the validation rows."""

    alias: str
    moved: bool
    reason: str
    metric: str | None = None  # "accuracy" of labels, "rouge_l" of generated text
    rows: int | None = None
    score: float | None = None
    current: str | None = None  # the reference that the alias stood for
    current_score: float | None = None
    interval: tuple[float, float] | None = None  # of the difference, 95 %, paired bootstrap

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What shall become of the alias once the version is there; kept by the job, for a server that dies in between."""

    tensors: str  # digest of the result's, which it is about
    verdict: Verdict | None  # None: no alias is wanted
    etag: int | None = None  # of the alias when it was decided; None: there was none

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Decision:
        """What `as_dict` gave."""
        verdict = fields["verdict"]
        return cls(**{**fields, "verdict": None if verdict is None else Verdict(**verdict)})


def judge(alias: str, new: Evaluation, current: Evaluation, *, seed: int) -> Verdict:
    """Judge two versions by their answers to the same rows. Takes up to a second: not for the event loop."""
    metric = "accuracy" if new.scored_as_labels else "rouge_l"
    found = new.compare(current, seed=seed, only=(metric,))[metric]
    low, high = found.interval
    wins, losses = _wins(new, current, metric)
    better = low > 0 and _chance(wins, losses) <= MAX_CHANCE
    shown = f"[{low:+.4f}, {high:+.4f}]"
    if better:
        reason = f"it is better than {current.name}: the difference lies in {shown}"
    elif high < 0:
        reason = f"it is worse than {current.name}: the difference lies in {shown}"
    else:
        rows = f"better in {wins} rows and worse in {losses}"
        reason = f"it is not surely better than {current.name}: {rows}, the difference lies in {shown}"
    return Verdict(
        alias=alias,
        moved=better,
        reason=reason,
        metric=metric,
        rows=len(new.rows),
        score=new.scores[metric],
        current=current.name,
        current_score=current.scored_as(new).scores[metric],
        interval=(round(low, 4), round(high, 4)),
    )


def _wins(new: Evaluation, current: Evaluation, metric: str) -> tuple[int, int]:
    """In how many rows the new one is better, and in how many worse."""
    one = (lambda a, t: float(a == t)) if metric == "accuracy" else rouge_l
    pairs = [
        (one(a, row.target), one(b, row.target))
        for row, a, b in zip(new.rows, new.answers, current.answers, strict=True)
    ]
    return sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)


def _chance(wins: int, losses: int) -> float:
    """Of so many wins or more if both were equally good (exact sign test; Dixon & Mood 1946).

    The bootstrap knows nothing of rows that it has not seen: of 4 wins and no loss it is certain, which is 1 in 16.
    """
    number = wins + losses
    ways = sum(math.comb(number, k) for k in range(wins, number + 1))
    return float(Fraction(ways, 2**number))
