"""From a folder of rows to a published task: train, evaluate on the test split, publish with where it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.base_model import BaseModel
from app.checkpoint import CONFIG_FILE, TENSORS_FILE, Checkpoint, read_checkpoint
from app.engine import Engine
from app.errors import InvalidRequest, InvalidTrainingData
from app.manifest import BaseReference, Calibration, Defaults, ManifestInput
from app.soft_prompt import SoftPrompt
from app.text import Template
from app.train.calibration import Judged, fit
from app.train.data import Row, encode, hold_out, read_rows, task_names
from app.train.evaluate import DEFAULT_ANSWER_TOKENS, ZERO_SHOT_TRIAL_ROWS, Evaluator
from app.train.recipe import Recipe
from app.train.report import TrainReport, thinned

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

    def labels(self, task: str | None = None) -> list[str]:
        """The distinct training targets, for a classification task, or those of a task. Raises InvalidTrainingData."""
        found = sorted({row.target for row in self.train if task in (None, row.task)})
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
    instruction: str = ""  # what the zero-shot baseline is told; without one there is no such baseline
    description: str = ""
    source: dict[str, str] = field(default_factory=dict)  # origin, licence, ... of the data
    started_from: str = ""  # the version whose prompt this one begins with
    for_task: str | None = None  # of the rows' tasks the one that is published; None: the first by name
    command: str = ""

    @property
    def tasks(self) -> list[str]:
        """Of multitask prompt tuning, in the order of the checkpoint; else none."""
        return task_names(self.splits.train) if self.recipe.method == "multitask_prompt_tuning" else []

    @property
    def task_id(self) -> int:
        """Of the checkpoint's tasks the one that is published. Raises InvalidRequest."""
        if self.for_task is None:
            return 0
        if self.for_task not in self.tasks:
            raise InvalidRequest(f"no row that is trained on has the task {self.for_task!r}", param="for_task")
        return self.tasks.index(self.for_task)

    def _of_task(self, rows: list[Row]) -> list[Row]:
        return [row for row in rows if row.task == self.tasks[self.task_id]] if self.tasks else rows

    @property
    def answer_tokens(self) -> int:
        return DEFAULT_ANSWER_TOKENS if self.max_tokens is None else self.max_tokens

    def evaluator(self, base: BaseModel, engine: Engine, on_row: Callable[[], None] = lambda: None) -> Evaluator:
        return Evaluator(
            engine=engine,
            tokenizer=base.tokenizer,
            eos_token_ids=base.eos_token_ids,
            labels=self.labels,
            max_tokens=self.answer_tokens,
            stop=self.stop,
            on_row=on_row,
        )

    def check(self, base: BaseModel) -> None:
        """Find before the training what would only fail after it. Raises InvalidRequest, InvalidTrainingData."""
        try:
            self._manifest(base, metrics={}, lineage={})
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise InvalidRequest(f"{where}: {problem['msg']}", param=where) from None
        spoken = len(base.tokenizer(self.instruction)["input_ids"]) if self.instruction else 0
        answer = self.answer_tokens
        if self.labels is not None:
            texts = [self.template.target(label) for label in self.labels]
            answer = max(map(len, base.tokenizer(texts, add_special_tokens=False)["input_ids"]))
        room = base.info.max_model_len - self.recipe.num_virtual_tokens - answer
        encode(self.splits.test, base.tokenizer, self.template, room - spoken)
        if self.labels is not None:  # calibrated on them
            encode(self._validation(), base.tokenizer, self.template, room)

    def manifest(
        self, base: BaseModel, report: TrainReport, metrics: dict[str, Any], calibration: Calibration | None = None
    ) -> ManifestInput:
        trained = report.as_dict()
        lineage = {
            "data": {**self.source, "digest": report.data_digest},
            "command": self.command,
            **({"started_from": self.started_from} if self.started_from else {}),
            **({"tasks": report.tasks} if report.tasks else {}),
            **({"trials": report.trials} if report.trials else {}),
            **{key: trained[key] for key in ("seed", "recipe", "precision", "steps", "best_step")},
            **{key: trained[key] for key in ("best_validation_loss", "stopped", "seconds")},
            **{key: trained[key] for key in ("train_rows", "validation_rows", "warnings")},
            "curve": thinned(report.curve),
        }
        return self._manifest(base, metrics, lineage, calibration)

    def _manifest(
        self,
        base: BaseModel,
        metrics: dict[str, Any],
        lineage: dict[str, Any],
        calibration: Calibration | None = None,
    ) -> ManifestInput:
        return ManifestInput(
            base=BaseReference(name=base.info.name, fingerprint=base.info.fingerprint),
            template=self.template.text,
            labels=self.labels,
            task_id=self.task_id,
            calibration=calibration,
            defaults=Defaults(max_tokens=self.max_tokens, stop=self.stop or None),
            metrics=metrics,
            lineage=lineage,
            description=self.description,
        )

    def read(self, out_dir: Path, base: BaseModel, manifest: ManifestInput) -> Checkpoint:
        """What training left in `out_dir`, through the same door as an upload."""
        config, tensors = ((out_dir / name).read_bytes() for name in (CONFIG_FILE, TENSORS_FILE))
        return read_checkpoint(config, tensors, manifest, base.info)

    def num_scored_rows(self, base: BaseModel, *, baselines: bool) -> int:
        """How often `calibration` and `metrics` will call `on_row`."""
        calibrated = 0 if self.labels is None else len(self._validation())
        return calibrated + self._num_tested_rows(base, baselines=baselines)

    def _num_tested_rows(self, base: BaseModel, *, baselines: bool) -> int:
        rows = len(self._of_task(self.splits.test))
        if not (baselines and self.instruction):
            return rows
        forms = 2 if base.tokenizer.chat_template else 1
        return rows * 2 + min(rows, ZERO_SHOT_TRIAL_ROWS) * forms

    def _validation(self) -> list[Row]:
        """As the training has them."""
        return self._of_task(self.splits.validation or hold_out(self.splits.train, by_task=bool(self.tasks))[1])

    async def load(self, base: BaseModel, engine: Engine, out_dir: Path) -> SoftPrompt:
        """What training left in `out_dir`, tried on the model."""
        prompt = self.read(out_dir, base, ManifestInput(task_id=self.task_id)).prompt
        await engine.load(prompt)
        return prompt

    async def calibration(
        self, base: BaseModel, engine: Engine, prompt: SoftPrompt, *, on_row: Callable[[], None]
    ) -> Calibration:
        """Of a classifier, on the validation rows. Raises InvalidTrainingData where they cannot tell."""
        rows, labels = self._validation(), self.labels or []
        scores = await self.evaluator(base, engine, on_row).label_scores(prompt, self.template, rows)
        return fit(Judged.of(scores, [row.target for row in rows], labels))

    async def metrics(
        self,
        base: BaseModel,
        engine: Engine,
        prompt: SoftPrompt,
        *,
        calibration: Calibration | None = None,
        baselines: bool,
        on_row: Callable[[], None],
    ) -> dict[str, Any]:
        """Scores on the whole test split, beside the floors and, with `baselines`, the zero-shot model.

        Without test rows there are none.
        """
        rows = self._of_task(self.splits.test)
        if not rows:
            return {}
        evaluator = self.evaluator(base, engine, on_row)
        found = await evaluator.evaluate(prompt, self.template, rows, calibration=calibration)
        metrics: dict[str, Any] = {
            "split": "test",
            "rows": len(rows),
            "soft_prompt": found.scores,
            "floor": evaluator.floors(self._of_task(self.splits.train), rows),
        }
        if baselines and self.instruction:
            metrics["zero_shot"] = await evaluator.zero_shot(self.instruction, self.template, rows, self.recipe.seed)
        return metrics
