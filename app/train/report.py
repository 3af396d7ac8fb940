"""What a training tells: progress after every step, and a report at its end."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPORT_FILE = "report.json"
MAX_POINTS = 200  # of a curve, in a manifest that may have a megabyte


@dataclass(frozen=True)
class Progress:
    """What `on_progress` is given after every step. Losses are nats per answer token."""

    step: int  # finished steps
    max_steps: int  # a budget may lower it
    train_loss: float  # of this step's batch
    validation_loss: float | None  # measured after this step, or None
    best_step: int  # 0: the start
    learning_rate: float  # of this step, as the recipe's: times the scale of what is trained
    trained_tokens: int  # of the rows so far, their ends included
    seconds: float  # spent training, over all resumed parts


@dataclass(frozen=True)
class TrainReport:
    """What a finished run did; `as_dict` is JSON and goes to the manifest's lineage."""

    steps: int
    best_step: int  # 0: the start, which no step was better than
    best_validation_loss: float  # nats per answer token
    curve: list[dict[str, float]]  # step, train_loss (mean since the last point; not at step 0), validation_loss
    stopped: str  # "max_steps", "no improvement" or "budget"
    seconds: float
    trained_tokens: int
    train_rows: int
    validation_rows: int
    data_digest: str  # sha256 of the rows
    seed: int
    template: str | None
    base_name: str
    recipe: dict[str, Any]
    precision: str = ""  # of products of matrices; of an older run it is not known
    warnings: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)  # of multitask prompt tuning: `task_id` of a manifest counts them
    trials: list[dict[str, float]] = field(default_factory=list)  # learning rates that were tried, and their losses

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)

    def save(self, folder: Path, identity: str) -> None:
        """Write report.json; `identity` names everything that shaped the result."""
        (folder / REPORT_FILE).write_text(json.dumps({"identity": identity, **self.as_dict()}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, identity: str) -> TrainReport | None:
        """The report of a run of that identity that finished in `folder`, or None."""
        try:
            fields = json.loads((folder / REPORT_FILE).read_text())
            return cls(**fields) if fields.pop("identity") == identity else None
        except (OSError, ValueError, LookupError, TypeError):
            return None


def thinned(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most MAX_POINTS of it, evenly, with the first and the last; losses to six digits."""
    if len(curve) > MAX_POINTS:
        curve = [curve[i * (len(curve) - 1) // (MAX_POINTS - 1)] for i in range(MAX_POINTS)]
    return [{name: round(number, 6) for name, number in point.items()} for point in curve]
