"""Train and answer every cell of the study: a task by a method with a seed. What is done already is not done again.

A cell leaves one JSON file with the answers to the whole test split; soft prompts also leave their PEFT files. Workers
are processes, each with a model of its own: on a GPU several keep it busy, on a CPU one is enough.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import queue
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.train.data import encode
from app.train.precision import cpu_has_bfloat16, mixed_precision
from app.train.recipe import Recipe
from app.train.report import Progress
from app.train.trainer import train
from benchmarks.quality.finetune import OutOfTime, few, finetune
from benchmarks.quality.predict import classify, generate
from benchmarks.quality.tasks import TASKS, StudyTask

MAX_LENGTH = 1024
NUM_SHOTS = 8
# Two for each method that trains, chosen between on the validation rows; soft prompts' are times the method's own unit.
RATES: dict[str, Sequence[float]] = {
    "full": (1e-4, 3e-5),
    "lora": (1e-3, 3e-4),
    "soft20": (0.3, 0.1),
    "soft100": (0.3, 0.1),
    "residual20": (0.2, 0.07),
    "prefix20": (0.02, 0.007),
    "cartridge64": (0.02, 0.05),
    "cartridge160": (0.02, 0.05),
}
# Of soft prompts: many small steps generalise better (docs/quality.md), and cost little where the model is frozen.
SOFT_BATCH_SIZE = 8
SOFT: dict[str, dict[str, Any]] = {  # of the recipe
    "soft20": {"num_virtual_tokens": 20},
    "soft100": {"num_virtual_tokens": 100},
    "residual20": {"num_virtual_tokens": 20, "residual": True},
    "prefix20": {"method": "prefix_tuning", "num_virtual_tokens": 20},
    # Keys and values that begin as those of the instruction and what fits of solved examples.
    "cartridge64": {"method": "cartridge", "num_virtual_tokens": 64},
    "cartridge160": {"method": "cartridge", "num_virtual_tokens": 160},
}


@dataclass(frozen=True)
class Cell:
    task: str
    method: str
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        told = "".join(f".{key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.task}.{self.method}{told}.s{self.seed}"


def cells(methods: Sequence[str], tasks: Sequence[str], seeds: Sequence[int], num_rates: int) -> list[Cell]:
    """In the order in which they are worth doing: every method for every task, then the next rate, the next seed."""
    found = []
    for seed in seeds:
        for turn in range(num_rates):
            for method in methods:
                rates = RATES.get(method, ())
                if turn < len(rates) or turn == 0:
                    options = {"rate": rates[turn]} if rates else {}
                    found += [Cell(task, method, seed, options) for task in tasks]
    return found


@dataclass(frozen=True)
class Study:
    data: Path
    out: Path
    model: Path
    device: str
    epochs: int  # passes over the training rows, at most
    patience: int  # passes that are no better than the best before, after which a run ends
    batch_size: int  # of full and lora
    max_rows: int | None
    deadline: float  # time.time(), which all processes share
    mixed: bool  # products in bfloat16 (app.train.precision); what the engine answers is as it serves

    @property
    def matrices(self) -> str:
        return "bfloat16" if self.mixed else "TF32" if self.device == "cuda" else "float32"


def do(study: Study, cell: Cell) -> dict[str, Any]:
    """Raises OutOfTime."""
    task, device = TASKS[cell.task], torch.device(study.device)
    splits = task.splits(study.data)
    limit = study.max_rows
    training, validation, test = splits.train[:limit], splits.validation[:limit], splits.test[:limit]
    tokenizer = AutoTokenizer.from_pretrained(study.model)
    model = AutoModelForCausalLM.from_pretrained(study.model, dtype=torch.float32).to(device).eval()
    if study.mixed and study.device == "cpu":
        model.set_attn_implementation("eager")  # a third faster there on short rows
    labels = splits.labels() if task.classify else None
    inputs = [row.input for row in test]
    template = task.template
    found: dict[str, Any] = {}
    deadline = time.monotonic() + study.deadline - time.time()
    began = time.monotonic()
    if cell.method in ("full", "lora"):
        own, held_out = (encode(rows, tokenizer, template, MAX_LENGTH) for rows in (training, validation))
        with mixed_precision(device, enabled=study.mixed):
            tuned = finetune(
                model,
                own,
                held_out,
                kind="full" if cell.method == "full" else "lora",
                learning_rate=cell.options["rate"],
                epochs=study.epochs,
                batch_size=study.batch_size,
                seed=cell.seed,
                patience=study.patience,
                deadline=deadline,
            )
        found |= {
            "validation_loss": tuned.validation_loss,
            "losses": tuned.losses,
            "best_epoch": tuned.best_epoch,
            "steps": tuned.steps,
            "train_seconds": tuned.seconds,
            "bytes": 4 * tuned.trainable,
        }
    elif cell.method == "few_shot":
        template = task.few_shot(few(training, NUM_SHOTS, cell.seed))
    elif cell.method == "zero_shot":
        template = task.few_shot([])
    else:
        return _soft(study, cell, task, model, tokenizer, training, validation, deadline)
    model.set_attn_implementation("sdpa")  # which takes the mask of many labels in one row
    with mixed_precision(device, enabled=study.mixed):
        if labels is not None:
            answers = classify(model, tokenizer, template, labels, inputs)
        else:
            answers = generate(model, tokenizer, template, inputs, max_tokens=task.max_tokens)
    return found | {"answers": answers, "seconds": time.monotonic() - began}


def _soft(
    study: Study,
    cell: Cell,
    task: StudyTask,
    model: Any,
    tokenizer: Any,
    training: Any,
    validation: Any,
    deadline: float,
) -> dict[str, Any]:
    """Trained by the product; the engine answers with it afterwards (`benchmarks.quality.answer`)."""
    out = study.out / "prompts" / cell.name
    own = SOFT[cell.method] | {"learning_rate": cell.options["rate"]}
    steps_per_pass = math.ceil(len(training) / SOFT_BATCH_SIZE)
    steps = study.epochs * steps_per_pass
    text = task.instruction
    if cell.method.startswith("cartridge"):
        text = (task.few_shot(few(training, NUM_SHOTS, cell.seed)).text or "").split("{input}")[0]
    recipe = Recipe(
        **own,
        init_text=text,
        batch_size=SOFT_BATCH_SIZE,
        max_steps=steps,
        warmup_steps=min(15, steps // 10),
        eval_every=steps_per_pass,  # as the baselines
        eval_rows=len(validation),
        patience=study.patience,
        checkpoint_every=steps,
        max_length=MAX_LENGTH,
        seed=cell.seed,
        precision="auto" if study.mixed else "float32",
    )

    def on_progress(_: Progress) -> None:
        if time.monotonic() > deadline:
            raise OutOfTime

    report = train(
        model,
        tokenizer,
        training,
        validation,
        task.template,
        recipe,
        out,
        base_name=study.model.name,
        on_progress=on_progress,
    )
    return {
        "validation_loss": report.best_validation_loss,
        "steps": report.steps,
        "best_step": report.best_step,
        "train_seconds": report.seconds,
        "bytes": (out / "adapter_model.safetensors").stat().st_size,
        "recipe": report.recipe,
    }


def is_done(path: Path, epochs: int, matrices: str) -> bool:
    """Whether that cell is there, by a run of as many passes in that precision where it trains."""
    if not path.exists():
        return False
    cell = json.loads(path.read_text(encoding="utf-8"))
    return "train_seconds" not in cell or (cell.get("epochs"), cell.get("matrices")) == (epochs, matrices)


def work(study: Study, todo: Any) -> None:
    """One worker: cells until there are none, or no time for one."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // 8) if study.device == "cuda" else cores)
    while time.time() < study.deadline:
        try:
            cell: Cell = todo.get(timeout=10)  # not at once: another process may hold the lock
        except queue.Empty:
            return
        path = study.out / f"{cell.name}.json"
        if is_done(path, study.epochs, study.matrices):
            continue
        began = time.time()
        if study.device == "cuda":  # what the cell before had at most is others' now
            gc.collect()
            torch.cuda.empty_cache()
        try:
            found = do(study, cell)
        except OutOfTime:
            print(f"{cell.name}: no time", flush=True)
            return
        except torch.OutOfMemoryError:
            print(f"{cell.name}: no memory, with {study.device} shared; run again with fewer workers", flush=True)
            continue
        except Exception:
            print(f"{cell.name}: FAILED\n{traceback.format_exc()}", flush=True)
            continue
        name = torch.cuda.get_device_name() if study.device == "cuda" else "CPU"
        about = {"device": name, "dtype": "float32", "matrices": study.matrices, "epochs": study.epochs}
        told = {"task": cell.task, "method": cell.method, "seed": cell.seed, **cell.options, **about, **found}
        path.with_suffix(".partial").write_text(json.dumps(told), encoding="utf-8")
        path.with_suffix(".partial").replace(path)
        loss = found.get("validation_loss", math.nan)
        print(f"{cell.name}: {time.time() - began:.0f} s, validation loss {loss:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of tasks, each with three .jsonl files")
    parser.add_argument("--model", type=Path, required=True, help="transformers folder of the base model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default="full,soft20,prefix20,cartridge160,lora,few_shot,zero_shot")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing, and end, after so long")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training rows, at most")
    parser.add_argument("--patience", type=int, default=2, help="passes without a better one that end a run")
    parser.add_argument("--rates", type=int, default=2, choices=(1, 2), help="learning rates of each method")
    parser.add_argument("--batch-size", type=int, default=32, help="of full and lora")
    parser.add_argument("--max-rows", type=int, help="of each split, for a trial")
    parser.add_argument("--mixed", action="store_true", help="products in bfloat16, on a processor that has it")
    arguments = parser.parse_args()
    if arguments.mixed and (arguments.device != "cpu" or not cpu_has_bfloat16()):
        parser.error("--mixed is for a CPU that has bfloat16")
    if arguments.device == "cuda":
        # TF32 for the matrices, in every method alike.
        os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "1"
    (arguments.out / "prompts").mkdir(parents=True, exist_ok=True)
    study = Study(
        arguments.data,
        arguments.out,
        arguments.model,
        arguments.device,
        arguments.epochs,
        arguments.patience,
        arguments.batch_size,
        arguments.max_rows,
        time.time() + arguments.seconds,
        arguments.mixed,
    )
    context = multiprocessing.get_context("spawn")
    todo = context.Queue()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    wanted = cells(arguments.methods.split(","), arguments.tasks.split(","), seeds, arguments.rates)
    for cell in wanted:
        todo.put(cell)
    workers = [context.Process(target=work, args=(study, todo)) for _ in range(arguments.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    done = sum(is_done(study.out / f"{cell.name}.json", study.epochs, study.matrices) for cell in wanted)
    print(f"{done} of {len(wanted)} cells are done")


if __name__ == "__main__":
    main()
