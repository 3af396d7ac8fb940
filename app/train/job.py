"""From a folder of rows to a published task: train, evaluate on the test split, publish with where it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.base_model import BaseModel
from app.checkpoint import CONFIG_FILE, TENSORS_FILE, Checkpoint, read_checkpoint
from app.engine import Engine
from app.errors import InvalidTrainingData
from app.manifest import BaseReference, Defaults, ManifestInput
from app.text import Template
from app.train.data import Row, read_rows
from app.train.evaluate import ZERO_SHOT_TRIAL_ROWS, Evaluator
from app.train.recipe import Recipe
from app.train.report import TrainReport

MAX_LABELS_FOUND = 200  # more distinct targets than that are not labels


@dataclass(frozen=True)
class Splits:
    """Rows of one data folder: train.jsonl, and validation.jsonl and test.jsonl where they exist."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]

    @classmethod
    def read(cls, path: Path) -> Splits:
        """`path` is a folder of splits, or one file of training rows. Raises InvalidTrainingData."""
        if path.is_file():
            return cls(read_rows(path), [], [])
        if not (path / "train.jsonl").is_file():
            raise InvalidTrainingData(f"{path} is neither a file nor a folder with train.jsonl")
        files = [path / f"{name}.jsonl" for name in ("train", "validation", "test")]
        return cls(*[read_rows(file) if file.is_file() else [] for file in files])

    def labels(self) -> list[str]:
        """The distinct training targets, for a classification task. Raises InvalidTrainingData."""
        found = sorted({row.target for row in self.train})
        if not 2 <= len(found) <= MAX_LABELS_FOUND:
            raise InvalidTrainingData(
                f"{len(found)} distinct targets cannot be labels; between 2 and {MAX_LABELS_FOUND} can"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and what its manifest will say."""

    task: str
    splits: Splits
    template: Template
    recipe: Recipe
    labels: list[str] | None = None
    max_tokens: int | None = None
    stop: list[str] = field(default_factory=list)
    instruction: str = ""  # what the zero-shot baseline is told
    description: str = ""
    source: dict[str, str] = field(default_factory=dict)  # origin, licence, ... of the data
    command: str = ""

    def evaluator(self, base: BaseModel, engine: Engine, on_row: Callable[[], None] = lambda: None) -> Evaluator:
        return Evaluator(
            engine=engine,
            tokenizer=base.tokenizer,
            eos_token_ids=base.eos_token_ids,
            labels=self.labels,
            max_tokens=self.max_tokens or 128,
            stop=self.stop,
            on_row=on_row,
        )

    def manifest(self, base: BaseModel, report: TrainReport, metrics: dict[str, Any]) -> ManifestInput:
        trained = report.as_dict()
        return ManifestInput(
            base=BaseReference(name=base.info.name, fingerprint=base.info.fingerprint),
            template=self.template.text,
            labels=self.labels,
            defaults=Defaults(max_tokens=self.max_tokens, stop=self.stop or None),
            metrics=metrics,
            lineage={
                "data": {**self.source, "digest": report.data_digest},
                "command": self.command,
                **{key: trained[key] for key in ("seed", "recipe", "steps", "best_step", "best_validation_loss")},
                **{key: trained[key] for key in ("stopped", "seconds", "train_rows", "validation_rows", "warnings")},
            },
            description=self.description,
        )

    def read(self, out_dir: Path, base: BaseModel, manifest: ManifestInput) -> Checkpoint:
        """What training left in `out_dir`, through the same door as an upload."""
        config, tensors = ((out_dir / name).read_bytes() for name in (CONFIG_FILE, TENSORS_FILE))
        return read_checkpoint(config, tensors, manifest, base.info)

    def num_scored_rows(self, base: BaseModel, *, baselines: bool) -> int:
        """How often `metrics` will call `on_row`."""
        rows = len(self.splits.test)
        if not baselines:
            return rows
        forms = 2 if base.tokenizer.chat_template else 1
        return rows * 2 + min(rows, ZERO_SHOT_TRIAL_ROWS) * forms

    async def metrics(
        self, base: BaseModel, engine: Engine, out_dir: Path, *, baselines: bool, on_row: Callable[[], None]
    ) -> dict[str, Any]:
        """Scores on the whole test split, beside the floors and, with `baselines`, the zero-shot model.

        Without test rows the prompt is still tried on the model, and there are no scores.
        """
        rows = self.splits.test
        prompt = self.read(out_dir, base, ManifestInput()).prompt
        await engine.load(prompt)
        if not rows:
            return {}
        evaluator = self.evaluator(base, engine, on_row)
        metrics: dict[str, Any] = {
            "split": "test",
            "rows": len(rows),
            "soft_prompt": await evaluator.score(prompt, self.template, rows),
            "floor": evaluator.floors(self.splits.train, rows),
        }
        if baselines:
            metrics["zero_shot"] = await evaluator.zero_shot(self.instruction, self.template, rows, self.recipe.seed)
        return metrics
