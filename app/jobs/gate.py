"""Whether a new version may take an alias over: only if it beats the one that has it, on the same rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from app.train.evaluation import Evaluation


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


def judge(alias: str, new: Evaluation, current: Evaluation, *, seed: int) -> Verdict:
    """Judge two versions by their answers to the same rows. Takes up to a second: not for the event loop."""
    metric = "accuracy" if new.scored_as_labels else "rouge_l"
    found = new.compare(current, seed=seed, only=(metric,))[metric]
    low, high = found.interval
    better = low > 0
    shown = f"[{low:+.4f}, {high:+.4f}]"
    if better:
        reason = f"it is better than {current.name}: the difference lies in {shown}"
    elif high < 0:
        reason = f"it is worse than {current.name}: the difference lies in {shown}"
    else:
        reason = f"it is not surely better than {current.name}: the difference lies in {shown}"
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
