"""Make a soft prompt of the study a version of its task, as `softprompt train` would have: measured and with lineage.

The engine that serves answers the whole test split; what the base model does without training stands beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file, save_file

from app.base_model import BaseModel, load_base_model
from app.checkpoint import CONFIG_FILE, TENSORS_FILE
from app.config import Settings
from app.engine import Engine
from app.local_engine import local_engine
from app.manifest import Calibration
from app.registry import Registry, Store
from app.train.job import Job
from app.train.recipe import Recipe
from app.train.report import REPORT_FILE, TrainReport
from benchmarks.quality.report import TOLD, Cell
from benchmarks.quality.run import NUM_SHOTS
from benchmarks.quality.tasks import TASKS, StudyTask

WITHHELD = f"the instruction and what fits of {NUM_SHOTS} solved training rows"
KNOWN = Path(__file__).parents[1] / "results" / "quality.json"
DESCRIPTIONS = {
    "banking77": "Intent of a bank customer's message: one of 77.",
    "clinc_domain": "Domain of a query to an assistant: one of ten, or out of scope.",
    "disfl_qa": "Rewrites a spoken question without its hesitations and corrections.",
    "emotion_ekman": "Emotion of a forum comment: anger, disgust, fear, joy, sadness, surprise or neutral.",
    "ingredients": 'Splits a line of a recipe into quantity, unit, name and comment: "field: value | ...".',
    "query_wellformed": "Whether a search query is a well-formed question: well-formed or malformed.",
    "restaurant_slots": 'Finds what a turn of a booking dialogue says: "slot: value | ...", or "none".',
}


def source(folder: Path) -> dict[str, str]:
    """Origin, licence and citation from the data folder's SOURCE.md."""
    found = re.findall(r"^- (origin|licence|cite): (.+)$", (folder / "SOURCE.md").read_text(encoding="utf-8"), re.M)
    return {name: re.sub(r" \(.*\)$", "", text) for name, text in found}


def job_of(cell: dict[str, Any], data: Path, report: TrainReport) -> Job:
    task = TASKS[cell["task"]]
    splits = task.splits(data)
    return Job(
        task=task.name,
        splits=splits,
        template=task.template,
        recipe=Recipe(**report.recipe),
        labels=splits.labels() if task.classify else None,
        max_tokens=None if task.classify else task.max_tokens,
        stop=[] if task.classify else ["\n"],
        description=DESCRIPTIONS.get(task.name, task.instruction),
        source=source(data / task.name),
        command=command(task, report.recipe),
    )


def command(task: StudyTask, recipe: dict[str, Any]) -> str:
    """What trains nearly the same without the study, whose rows may have 1,024 tokens.

    Empty where the start is withheld.
    """
    if recipe["init_text"] == WITHHELD:
        return ""
    options = {
        "data": f"data/{task.name}",
        "template": task.template.text,
        "method": recipe.get("method", "prompt_tuning"),
        "init-text": recipe["init_text"],
        "virtual-tokens": recipe["num_virtual_tokens"],
        "steps": recipe["max_steps"],
        "seed": recipe["seed"],
        **{name.replace("_", "-"): recipe[name] for name in ("batch_size", "learning_rate", "eval_every")},
        **{name.replace("_", "-"): recipe[name] for name in ("eval_rows", "patience")},
    }
    words = ["softprompt", "train", task.name]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    words += ["--residual"] if recipe.get("residual") else []
    words += ["--precision", "float32"] if recipe.get("precision") == "float32" else []
    words += ["--classify"] if task.classify else ["--max-tokens", str(task.max_tokens), "--stop", "\n"]
    return shlex.join(words)


def told(report: TrainReport) -> TrainReport:
    """Without the rows that a cartridge begins with: their licences are not this repository's."""
    if not str(report.recipe.get("method", "")).startswith("cartridge"):
        return report
    return replace(report, recipe={**report.recipe, "init_text": WITHHELD})


def told_in_words(task: str, known: Sequence[Cell], registry: Registry) -> dict[str, Any]:
    """What the base model does on these rows without training: of the study, or of a version that measured it."""
    found = {cell["method"]: cell["scores"] for cell in known if cell["task"] == task and cell["method"] in TOLD}
    for earlier in (own for own in registry.tasks() if own.name == task):
        for version in earlier.versions.values():
            found = {name: version.manifest.metrics[name] for name in TOLD if name in version.manifest.metrics} | found
    return found


def in_half(folder: Path, into: Path) -> Path:
    """The PEFT files with tensors in float16, half as large. Returns `into`."""
    shutil.copy(folder / CONFIG_FILE, into)
    tensors = {name: tensor.half() for name, tensor in load_file(folder / TENSORS_FILE).items()}
    save_file(tensors, into / TENSORS_FILE)
    return into


async def measured(
    job: Job, base: BaseModel, engine: Engine, folder: Path
) -> tuple[Calibration | None, dict[str, Any], list[str]]:
    """Calibration on the validation rows; scores and answers on the test split."""
    prompt = await job.load(base, engine, folder)
    calibration = None
    if job.labels is not None:
        calibration = await job.calibration(base, engine, prompt, on_row=lambda: None)
    evaluator, test = job.evaluator(base, engine), job.splits.test
    found = await evaluator.evaluate(prompt, job.template, test, calibration=calibration)
    floor = evaluator.floors(job.splits.train, test)
    metrics = {"split": "test", "rows": len(test), "soft_prompt": found.scores, "floor": floor}
    return calibration, metrics, list(found.answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", help="e.g. emotion_ekman.soft20.s0")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="of benchmarks.quality.run")
    parser.add_argument("--registry", type=Path, default=Path("prompts"))
    parser.add_argument("--json", type=Path, default=KNOWN, help="of benchmarks.quality.report: what needs no training")
    parser.add_argument("--half", action="store_true", help="tensors in float16; measured as such")
    arguments = parser.parse_args()
    settings = Settings(registry=arguments.registry)
    base = load_base_model(settings.model, cache_dir=settings.cache_dir, device=settings.device, dtype=settings.dtype)
    registry = Registry(Store(arguments.registry), base.info)
    known = json.loads(arguments.json.read_text(encoding="utf-8"))
    engine = local_engine(settings, base)
    engine.start()
    try:
        for name in arguments.cells:
            folder = arguments.out / "prompts" / name
            cell = json.loads((arguments.out / f"{name}.json").read_text(encoding="utf-8"))
            fields = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
            report = TrainReport.load(folder, fields["identity"])
            if report is None:
                raise SystemExit(f"{folder} has no report of a finished run")
            report = told(report)
            job = job_of(cell, arguments.data, report)
            with TemporaryDirectory() as made:
                files = in_half(folder, Path(made)) if arguments.half else folder
                calibration, metrics, answers = asyncio.run(measured(job, base, engine, files))
                metrics |= told_in_words(job.task, known, registry)
                checkpoint = job.read(files, base, job.manifest(base, report, metrics, calibration))
                version = registry.publish(job.task, checkpoint, actor="benchmarks.quality").version
            if "answers" not in cell:
                (arguments.out / f"{name}.json").write_text(json.dumps(cell | {"answers": answers}), encoding="utf-8")
            print(f"{version.reference}: {json.dumps(metrics['soft_prompt'])}", flush=True)
    finally:
        engine.stop()


if __name__ == "__main__":
    main()
