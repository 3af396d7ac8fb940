"""What `softprompt eval` does: one version or two on the same rows, and what is shown of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from app.base_model import BaseModel
from app.cli.output import progress_bar, write, write_table
from app.config import Settings
from app.engine.local import LocalEngine
from app.local_engine import local_engine
from app.manifest import ManifestInput
from app.registry import Registry, Store
from app.soft_prompt import SoftPrompt
from app.text import Template
from app.train import Row
from app.train.data import digest
from app.train.evaluate import DEFAULT_ANSWER_TOKENS, Evaluator
from app.train.evaluation import Evaluation
from app.train.html_report import MAX_WRONG, Report, render


@dataclass(frozen=True)
class Contestant:
    """A version, or the base model: without a prompt, and asked as `manifest` says."""

    name: str
    prompt: SoftPrompt | None
    manifest: ManifestInput


@dataclass(frozen=True)
class Evaluated:
    """One version's answers, or two versions' answers to the same rows."""

    base_name: str
    version: Contestant
    evaluation: Evaluation
    against: Evaluation | None
    seed: int

    @cached_property
    def summaries(self) -> list[dict[str, Any]]:
        found = [self.evaluation.summary(self.seed)]
        if self.against is not None:
            found.append(self.against.scored_as(self.evaluation).summary(self.seed))
        return found

    @cached_property
    def differences(self) -> dict[str, Any]:
        if self.against is None:
            return {}
        found = self.evaluation.compare(self.against, seed=self.seed)
        return {name: difference.as_dict() for name, difference in found.items()}

    def answers(self, numbers: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """Of all rows, or of these; with the other version's answer as `against`."""
        chosen = range(len(self.evaluation.rows)) if numbers is None else numbers
        for i, record in zip(chosen, self.evaluation.records(chosen), strict=True):
            yield record if self.against is None else record | {"against": self.against.answers[i]}

    def document(self) -> dict[str, Any]:
        """All but the answers that were right, for a program."""
        wrong = self.evaluation.wrong()
        rows = self.evaluation.rows
        mine, *theirs = self.summaries
        return {
            "base_model": self.base_name,
            "rows": len(rows),
            "data_digest": digest([], rows),
            "seed": self.seed,
            "evaluation": mine,
            "against": theirs[0] if theirs else None,
            "differences": self.differences,
            "num_wrong": len(wrong),
            "wrong": list(self.answers(wrong[:MAX_WRONG])),
        }

    def page(self, file: str) -> str:
        """For a person, as HTML; `file` is the name of the rows."""
        found = self.document()
        facts = {
            "Version": self.evaluation.name,
            "Against": self.against.name if self.against else None,
            "Description": self.version.manifest.description,
            "Base model": self.base_name,
            "Rows": f"{found['rows']} of {file}",
            "Data": found["data_digest"],
        }
        return render(
            Report(
                title=f"{self.evaluation.name}: evaluation",
                facts={name: fact for name, fact in facts.items() if fact},
                evaluation=found["evaluation"],
                against=found["against"],
                differences=found["differences"],
                lineage=self.version.manifest.lineage if self.version.prompt else {},
                wrong=found["wrong"],
                num_wrong=found["num_wrong"],
            )
        )

    def tell(self) -> None:
        """A row for each score, on stdout."""
        mine, *theirs = self.summaries
        columns = ["score"]
        for one in self.summaries:
            columns += [one["name"], "95 %"]
        columns += ["difference", "95 %"] if theirs else []
        rows = []
        for name in mine["scores"]:
            row: list[Any] = [name]
            for one in self.summaries:
                row += _cells(one["scores"].get(name), one["intervals"].get(name), "")
            if theirs:
                found = self.differences.get(name, {})
                row += _cells(found.get("difference"), found.get("interval"), "+")
            rows.append(row)
        write_table(columns, rows)
        write(f"({mine['rows']} rows)")


def check_outputs(data: Path, *paths: Path | None) -> None:
    """Before minutes of work. Raises BadParameter for what cannot be written, or would write over the rows."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir() or not path.parent.is_dir():
            raise typer.BadParameter(f"{path} is no place for a file")
        if path.exists() and data.exists() and path.samefile(data):
            raise typer.BadParameter(f"{path} is where the rows are")


async def evaluate_references(
    references: Sequence[str], rows: Sequence[Row], settings: Settings, base: BaseModel, *, seed: int, console: Console
) -> Evaluated:
    """One reference or two, each a published version or the base model's name. Answers are greedy."""
    with ExitStack() as stack:
        registry = Registry(Store(settings.registry), base.info)
        contestants = [_contestant(reference, registry, base, stack) for reference in references]
        versions = [one for one in contestants if one.prompt is not None]
        with evaluators(len(rows) * len(contestants), settings, base, console) as evaluator:
            found = []
            for one in contestants:
                asked = one.manifest if one.prompt or not versions else _as_the_base_is_asked(versions[0].manifest)
                found.append(
                    await evaluator(asked).evaluate(
                        one.prompt, Template(asked.template), rows, name=one.name, calibration=asked.calibration
                    )
                )
    return Evaluated(base.info.name, contestants[0], found[0], found[1] if found[1:] else None, seed)


def _contestant(reference: str, registry: Registry, base: BaseModel, stack: ExitStack) -> Contestant:
    if reference == base.info.name:
        return Contestant(reference, None, ManifestInput())
    pin = registry.pin(reference)
    stack.callback(pin.release)
    return Contestant(pin.version.reference, pin.prompt, pin.version.manifest)


def _as_the_base_is_asked(manifest: ManifestInput) -> ManifestInput:
    """A version's temperature says nothing about the base model's probabilities."""
    return ManifestInput(template=manifest.template, labels=manifest.labels, defaults=manifest.defaults)


@contextmanager
def evaluators(
    num_rows: int, settings: Settings, base: BaseModel, console: Console
) -> Iterator[Callable[[ManifestInput], Evaluator]]:
    """What makes an evaluator by a version's manifest; one engine and one bar for the rows of all."""
    with started_engine(settings, base) as engine, progress_bar(console=console) as bar:
        scored = bar.add_task("scoring", total=num_rows)

        def evaluator(manifest: ManifestInput) -> Evaluator:
            return Evaluator(
                engine=engine,
                tokenizer=base.tokenizer,
                eos_token_ids=base.eos_token_ids,
                labels=manifest.labels,
                max_tokens=manifest.defaults.max_tokens or DEFAULT_ANSWER_TOKENS,
                stop=manifest.defaults.stop or (),
                on_row=lambda: bar.advance(scored),
            )

        yield evaluator


@contextmanager
def started_engine(settings: Settings, base: BaseModel) -> Iterator[LocalEngine]:
    engine = local_engine(settings, base)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def _cells(number: float | None, interval: Sequence[float] | None, sign: str) -> list[str | None]:
    if number is None or interval is None:
        return [None, None]
    return [f"{number:{sign}.4f}", f"{interval[0]:{sign}.4f} to {interval[1]:{sign}.4f}"]
