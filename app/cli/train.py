"""What `softprompt train`, `softprompt eval` and `softprompt calibrate` do, with their progress bars."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from torch import Tensor

from app.base_model import BaseModel
from app.checkpoint import CONFIG_FILE, TENSORS_FILE, read_checkpoint
from app.cli.output import progress_bar, write_table
from app.config import Settings
from app.engine.local import LocalEngine
from app.errors import InvalidRequest, InvalidTrainingData, TrainingFailed
from app.local_engine import local_engine
from app.manifest import Calibration, ManifestInput
from app.registry import Published, Registry, Store
from app.registry.reference import check_alias_name, check_task_name
from app.text import Template
from app.train import Progress as Step
from app.train import Row, TrainReport
from app.train.calibration import Judged, fit
from app.train.data import digest
from app.train.evaluate import DEFAULT_ANSWER_TOKENS, Evaluator
from app.train.job import Job
from app.train.trainer import train


def train_and_publish(
    job: Job,
    settings: Settings,
    base: BaseModel,
    work: Path,
    *,
    alias: str | None,
    baselines: bool,
    console: Console,
    initial: Tensor | None = None,
) -> Published:
    """Train in `work`, from `initial` if there is one, score on the test rows, publish; tells how on `console`."""
    check_task_name(job.task)
    if alias is not None:
        check_alias_name(alias)
    job.check(base)
    if baselines and job.splits.test and not job.instruction:
        console.print("no --instruction and no --init-text: there will be no zero-shot baseline")
    registry = Registry(Store(settings.registry), base.info)
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / ".lock", timeout=0):
            report = _train(job, base, work, console, initial)
    except Timeout:
        raise TrainingFailed(f"another process is training in {work}") from None
    for warning in report.warnings:
        console.print(f"[yellow]warning[/yellow]: {warning}")
    with _engine(settings, base) as engine, progress_bar(console=console) as bar:
        scored = bar.add_task("scoring", total=job.num_scored_rows(base, baselines=baselines))

        async def measure() -> tuple[Calibration | None, dict[str, Any]]:
            prompt, calibration = await job.load(base, engine, work), None
            if job.labels is not None:
                try:
                    calibration = await job.calibration(base, engine, prompt, on_row=lambda: bar.advance(scored))
                except InvalidTrainingData as error:
                    console.print("[yellow]warning[/yellow]: not calibrated:", error.message, highlight=False)
            return calibration, await job.metrics(
                base,
                engine,
                prompt,
                calibration=calibration,
                baselines=baselines,
                on_row=lambda: bar.advance(scored),
            )

        calibration, metrics = asyncio.run(measure())
    checkpoint = job.read(work, base, job.manifest(base, report, metrics, calibration))
    published = registry.publish(job.task, checkpoint, alias=alias)
    verb = "published" if published.created else "was published before as"
    console.print(f"{verb} [bold]{published.version.reference}[/bold]  {published.version.digest}")
    if metrics:
        _tell(metrics, console)
    return published


async def evaluate_reference(
    reference: str, rows: Sequence[Row], settings: Settings, base: BaseModel, *, console: Console
) -> dict[str, float]:
    """Scores of a published prompt, or of the bare base model under its own name; answers are greedy."""
    prompt, manifest = None, ManifestInput()
    if reference != base.info.name:
        pin = Registry(Store(settings.registry), base.info).pin(reference)
        prompt, manifest = pin.prompt, pin.version.manifest
    with _evaluator(manifest, len(rows), settings, base, console) as evaluator:
        return await evaluator.score(prompt, Template(manifest.template), rows, manifest.calibration)


async def calibrate_reference(
    reference: str,
    rows: Sequence[Row],
    settings: Settings,
    base: BaseModel,
    *,
    alias: str | None,
    command: str,
    console: Console,
) -> Published:
    """Publish a classifier again, its probabilities calibrated on `rows`: the same files under a new manifest.

    It is a new version with another digest, because it answers with other probabilities. Raises InvalidRequest for a
    version without labels, and what `fit` and the registry do.
    """
    if alias is not None:
        check_alias_name(alias)
    registry = Registry(Store(settings.registry), base.info)
    pin = registry.pin(reference)
    version, given = pin.version, pin.version.manifest
    if not given.labels:
        raise InvalidRequest(f"{version.reference} has no labels: only classifiers are calibrated", param="reference")
    targets = [row.target for row in rows]
    with _evaluator(given, len(rows), settings, base, console) as evaluator:
        scores = await evaluator.label_scores(pin.prompt, given.parsed_template, rows)
    calibration = fit(Judged.of(scores, targets, given.labels))
    origin = {"version": version.reference, "digest": version.digest, "data": digest([], rows), "command": command}
    changed = {"calibration": calibration, "lineage": {**given.lineage, "calibration": origin}}
    kept = {name: getattr(given, name) for name in ManifestInput.model_fields}
    config, tensors = (registry.read_file(version.task, version.number, name) for name in (CONFIG_FILE, TENSORS_FILE))
    checkpoint = read_checkpoint(config, tensors, ManifestInput(**{**kept, **changed}), base.info)
    return registry.publish(version.task, checkpoint, alias=alias, actor="calibrate")


@contextmanager
def _evaluator(
    manifest: ManifestInput, num_rows: int, settings: Settings, base: BaseModel, console: Console
) -> Iterator[Evaluator]:
    """By what the manifest says of a version, with a bar for the rows."""
    with _engine(settings, base) as engine, progress_bar(console=console) as bar:
        scored = bar.add_task("scoring", total=num_rows)
        yield Evaluator(
            engine=engine,
            tokenizer=base.tokenizer,
            eos_token_ids=base.eos_token_ids,
            labels=manifest.labels,
            max_tokens=manifest.defaults.max_tokens or DEFAULT_ANSWER_TOKENS,
            stop=manifest.defaults.stop or (),
            on_row=lambda: bar.advance(scored),
        )


def starting_prompt(reference: str, settings: Settings, base: BaseModel) -> tuple[str, Tensor]:
    """The version that a reference names now, and its prompt: see SoftPrompt."""
    pin = Registry(Store(settings.registry), base.info).pin(reference)
    return pin.version.reference, pin.prompt.tensor


def _train(job: Job, base: BaseModel, work: Path, console: Console, initial: Tensor | None) -> TrainReport:
    with progress_bar(console=console) as bar:
        shown = bar.add_task("training", total=job.recipe.max_steps)
        validation = ""

        def on_progress(step: Step) -> None:
            nonlocal validation
            if step.validation_loss is not None:
                validation = f"  validation {step.validation_loss:.4f} (best at step {step.best_step})"
            bar.update(
                shown,
                completed=step.step,
                total=step.max_steps,
                description=f"training  loss {step.train_loss:.4f}{validation}",
            )

        return train(
            base.model,
            base.tokenizer,
            job.splits.train,
            job.splits.validation,
            job.template,
            job.recipe,
            work,
            base_name=base.info.name,
            base_fingerprint=base.info.fingerprint,
            initial=initial,
            on_progress=on_progress,
        )


@contextmanager
def _engine(settings: Settings, base: BaseModel) -> Iterator[LocalEngine]:
    engine = local_engine(settings, base)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def _tell(metrics: dict[str, object], console: Console) -> None:
    """One row a contestant, one column a score."""
    contestants: dict[str, dict[str, object]] = {}
    for name, scores in metrics.items():
        if isinstance(scores, dict):
            nested = all(isinstance(value, dict) for value in scores.values())
            contestants |= {f"{name}: {k}": v for k, v in scores.items()} if nested else {name: scores}
    names = [name for name, value in contestants["soft_prompt"].items() if isinstance(value, float)]
    rows = ((contestant, *(scores.get(name) for name in names)) for contestant, scores in contestants.items())
    write_table((f"{metrics['rows']} {metrics['split']} rows", *names), rows, console=console)
