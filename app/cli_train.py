"""What `softprompt train` and `softprompt eval` do, with their progress bars."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from app.base_model import BaseModel
from app.config import Settings
from app.engine.local import LocalEngine
from app.errors import TrainingFailed
from app.local_engine import local_engine
from app.registry import Published, Registry, Store
from app.registry.reference import check_alias_name, check_task_name
from app.text import Template
from app.train import Progress as Step
from app.train import Row, TrainReport
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
) -> Published:
    """Train in `work`, score on the test rows, publish; tells how it goes on `console`."""
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
            report = _train(job, base, work, console)
    except Timeout:
        raise TrainingFailed(f"another process is training in {work}") from None
    for warning in report.warnings:
        console.print(f"[yellow]warning[/yellow]: {warning}")
    with _engine(settings, base) as engine, _bar(console) as bar:
        scored = bar.add_task("scoring", total=job.num_scored_rows(base, baselines=baselines))
        metrics = asyncio.run(job.metrics(base, engine, work, baselines=baselines, on_row=lambda: bar.advance(scored)))
    checkpoint = job.read(work, base, job.manifest(base, report, metrics))
    published = registry.publish(job.task, checkpoint, alias=alias)
    verb = "published" if published.created else "was published before as"
    console.print(f"{verb} [bold]{published.version.reference}[/bold]  {published.version.digest}")
    if metrics:
        console.print(_table(metrics))
    return published


async def evaluate_reference(
    reference: str, rows: Sequence[Row], settings: Settings, base: BaseModel, *, console: Console
) -> dict[str, float]:
    """Scores of a published prompt, or of the bare base model under its own name; answers are greedy."""
    prompt, template, labels, max_tokens, stop = None, Template(None), None, None, None
    if reference != base.info.name:
        pin = Registry(Store(settings.registry), base.info).pin(reference)
        manifest = pin.version.manifest
        prompt, template, labels = pin.prompt, manifest.parsed_template, manifest.labels
        max_tokens, stop = manifest.defaults.max_tokens, manifest.defaults.stop
    with _engine(settings, base) as engine, _bar(console) as bar:
        scored = bar.add_task("scoring", total=len(rows))
        evaluator = Evaluator(
            engine=engine,
            tokenizer=base.tokenizer,
            eos_token_ids=base.eos_token_ids,
            labels=labels,
            max_tokens=max_tokens or DEFAULT_ANSWER_TOKENS,
            stop=stop or (),
            on_row=lambda: bar.advance(scored),
        )
        return await evaluator.score(prompt, template, rows)


def _train(job: Job, base: BaseModel, work: Path, console: Console) -> TrainReport:
    with _bar(console) as bar:
        shown = bar.add_task("training", total=job.recipe.max_steps)
        validation = ""

        def on_progress(step: Step) -> None:
            nonlocal validation
            if step.validation_loss is not None:
                validation = f"  validation {step.validation_loss:.4f} (best at step {step.best_step})"
            bar.update(shown, completed=step.step, description=f"training  loss {step.train_loss:.4f}{validation}")

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


def _bar(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, console=console)


def _table(metrics: dict[str, object]) -> Table:
    """One row a contestant, one column a score."""
    contestants: dict[str, dict[str, object]] = {}
    for name, scores in metrics.items():
        if isinstance(scores, dict):
            nested = all(isinstance(value, dict) for value in scores.values())
            contestants |= {f"{name}: {k}": v for k, v in scores.items()} if nested else {name: scores}
    names = [name for name, value in contestants["soft_prompt"].items() if isinstance(value, float)]
    table = Table("", *names, title=f"{metrics['rows']} {metrics['split']} rows")
    for contestant, scores in contestants.items():
        table.add_row(contestant, *[str(scores.get(name, "")) for name in names])
    return table
