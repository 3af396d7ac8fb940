"""Whether a new version may take an alias over: only if it beats the one that has it, on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from app.train.metrics import accuracy, paired_interval, rouge_l


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


def compare(
    alias: str,
    current: str,
    answers: Sequence[str],
    current_answers: Sequence[str],
    targets: Sequence[str],
    *,
    labels: bool,
    seed: int,
) -> Verdict:
    """Judge two versions by their answers to the same rows. Takes up to a second: not for the event loop."""
    metric = accuracy if labels else rouge_l
    new = [metric([answer], [target]) for answer, target in zip(answers, targets, strict=True)]
    old = [metric([answer], [target]) for answer, target in zip(current_answers, targets, strict=True)]
    low, high = paired_interval([a - b for a, b in zip(new, old, strict=True)], seed=seed)
    better = low > 0
    shown = f"[{low:+.4f}, {high:+.4f}]"
    if better:
        reason = f"it is better than {current}: the difference lies in {shown}"
    elif high < 0:
        reason = f"it is worse than {current}: the difference lies in {shown}"
    else:
        reason = f"it is not surely better than {current}: the difference lies in {shown}"
    return Verdict(
        alias=alias,
        moved=better,
        reason=reason,
        metric="accuracy" if labels else "rouge_l",
        rows=len(targets),
        score=round(sum(new) / len(new), 4),
        current=current,
        current_score=round(sum(old) / len(old), 4),
        interval=(round(low, 4), round(high, 4)),
    )
