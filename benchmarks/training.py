"""`python -m benchmarks.training --json out.json`: prompt tuning by this trainer, and by PEFT with Trainer.

Both train the same number of virtual tokens from the same start, on the same batches of rows, with the same AdamW and
rate, and loss on the answers alone. They take turns of a few steps, in one process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from app.base_model import BaseModel, load_base_model
from app.config import default_cache_dir
from app.text import Template
from app.train.data import Row, batches, encode, read_rows
from app.train.initial import embedding_rms, initial_prompt
from app.train.precision import product_dtype
from app.train.recipe import Recipe
from app.train.report import Progress
from app.train.trainer import train
from benchmarks import machine
from benchmarks.driver import say
from benchmarks.run import QUIET

DATA = Path(__file__).parents[1] / "examples" / "data"
BETAS = (0.9, 0.99)  # as app.train.loop has them
OURS, PEER = "ours", "peft"


class Enough(Exception):
    """The system has done all its steps."""


class Lane:
    """One system's training in a thread of its own, which goes on only when told, by some steps."""

    def __init__(self, train_: Callable[[Lane], None]) -> None:
        self.losses: list[float] = []  # of all steps, when it has ended
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._left = 0
        self._stop = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(train_,), daemon=True)
        self._thread.start()

    def advance(self, steps: int) -> tuple[float, float]:
        """Whole steps, from the end of one to the end of another: (seconds, seconds of all cores)."""
        self._left = steps
        begin, cpu = time.perf_counter(), time.process_time()
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        return time.perf_counter() - begin, time.process_time() - cpu

    def end(self) -> None:
        self._stop = True
        self._go.release()
        self._thread.join()

    def step_ended(self) -> bool:
        """Called by the training after each step; True: that was the last one."""
        self._left -= 1
        if self._left == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._paused.release()
            self._go.acquire()
        return self._stop

    def _run(self, train_: Callable[[Lane], None]) -> None:
        self._go.acquire()
        try:
            train_(self)
        except BaseException as error:
            self._error = error
        self._paused.release()


def ours(base: BaseModel, rows: list[Row], template: Template, recipe: Recipe, lane: Lane) -> None:
    """`app.train.train`, which validates and saves at none of the steps."""

    def count(progress: Progress) -> None:
        lane.losses.append(progress.train_loss)
        if lane.step_ended():
            raise Enough

    with tempfile.TemporaryDirectory() as folder:
        try:
            train(
                base.model, base.tokenizer, rows, rows[:1], template, recipe, Path(folder),
                base_name="base", on_progress=count,
            )  # fmt: skip
        except Enough:
            pass


class Timed(TrainerCallback):  # type: ignore[misc]
    def __init__(self, lane: Lane) -> None:
        self.lane = lane

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = self.lane.step_ended()


class Losses(Trainer):  # type: ignore[misc]
    """Keeps each step's loss, as a tensor: nothing waits for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[torch.Tensor] = []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.seen.append(loss.detach())
        return loss


def peer(base: BaseModel, rows: list[Row], template: Template, recipe: Recipe, lane: Lane) -> None:
    """PEFT's prompt tuning by transformers' Trainer: padding by batch, lengths grouped, no logs, checkpoints or cache.

    Rows come in the order of our batches, so that both do the same; it groups lengths at least as well as
    Trainer's own `group_by_length`. Padding is on the right, where PEFT's positions are right.
    """
    examples = encode(rows, base.tokenizer, template, recipe.max_length)
    lengths = [len(example.ids) for example in examples]
    order = [i for batch in batches(lengths, recipe.batch_size, recipe.seed, 0) for i in batch]
    data = [
        {
            "input_ids": list(examples[i].ids),
            "attention_mask": [1] * lengths[i],
            "labels": [-100] * examples[i].start + list(examples[i].ids[examples[i].start :]),
        }
        for i in order
    ]
    rms = embedding_rms(base.model)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=recipe.num_virtual_tokens, prompt_tuning_init="RANDOM"
    )
    base.model.config.use_cache = False
    base.model.requires_grad_(False)
    model = peft.get_peft_model(base.model, config)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(initial_prompt(base.model, base.tokenizer, recipe))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=recipe.batch_size,
            train_sampling_strategy="sequential",
            max_steps=recipe.max_steps,
            learning_rate=recipe.learning_rate * rms,
            lr_scheduler_type="cosine",
            warmup_steps=0,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            max_grad_norm=recipe.max_grad_norm / rms,
            bf16=product_dtype(base.model, recipe.precision) != base.dtype,
            optim="adamw_torch_fused" if base.device.type == "cuda" else "adamw_torch",
            use_cpu=base.device.type == "cpu",
            dataloader_pin_memory=base.device.type == "cuda",
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=recipe.seed,
        )
        base.tokenizer.padding_side = "right"
        if base.tokenizer.pad_token is None:
            base.tokenizer.pad_token = base.tokenizer.eos_token
        trainer = Losses(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=DataCollatorForSeq2Seq(base.tokenizer, label_pad_token_id=-100),
            callbacks=[Timed(lane)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    lane.losses += torch.stack(trainer.seen).tolist()
    base.model.config.use_cache = True


SYSTEMS = {OURS: ours, PEER: peer}


def measure(base: BaseModel, arguments: argparse.Namespace, done: Callable[[list[dict[str, Any]]], None]) -> None:
    """Setting after setting; `done` is told all of them each time."""
    settings: list[dict[str, Any]] = []
    template = Template(arguments.template)
    for virtual, batch_size, name in itertools.product(arguments.virtual, arguments.batch, arguments.data):
        rows = read_rows(DATA / name / "train.jsonl")
        rows = rows[: len(rows) // batch_size * batch_size]  # every batch is a whole one
        if len(rows) < (arguments.warm_up + arguments.pairs * arguments.steps) * batch_size:
            raise SystemExit(f"{name} has too few rows for that many steps of {batch_size}")
        recipe = Recipe(
            num_virtual_tokens=virtual, batch_size=batch_size, max_steps=300, warmup_steps=0,
            eval_every=1000, checkpoint_every=1000, precision="auto" if arguments.mixed else "float32",
        )  # fmt: skip
        lanes = {system: Lane(partial(run, base, rows, template, recipe)) for system, run in SYSTEMS.items()}
        for lane in lanes.values():
            lane.advance(arguments.warm_up)
        pairs: list[dict[str, tuple[float, float]]] = []
        for pair in range(arguments.pairs):
            order = list(lanes) if pair % 2 == 0 else list(reversed(lanes))
            pairs.append({system: lanes[system].advance(arguments.steps) for system in order})
            seconds = ", ".join(f"{system} {pairs[-1][system][0] / arguments.steps:.3f}" for system in lanes)
            say(f"{name}, {virtual} virtual tokens, {batch_size} rows, pair {pair}, seconds a step: {seconds}")
        for lane in lanes.values():
            lane.end()
        losses = {system: lane.losses for system, lane in lanes.items()}
        settings.append({"data": name, "virtual": virtual, "batch": batch_size, "pairs": pairs, "losses": losses})
        done(settings)


def summary(settings: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """A line a setting: medians over its pairs, ratios within each, and how far apart the losses are."""
    lines = []
    for setting in settings:
        pairs = setting["pairs"]
        ratios = [pair[PEER][0] / pair[OURS][0] for pair in pairs]
        apart = [abs(a - b) for a, b in zip(*(setting["losses"][system] for system in SYSTEMS), strict=True)]
        lines.append(
            {
                **{name: setting[name] for name in ("data", "virtual", "batch")},
                **{name: statistics.median(steps / pair[name][0] for pair in pairs) for name in SYSTEMS},
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "cpu_ratio": statistics.median(pair[PEER][1] / pair[OURS][1] for pair in pairs),
                "first_apart": apart[0],
                "most_apart": max(apart),
            }
        )
    return lines


def render(result: dict[str, Any]) -> str:
    facts = result["machine"]
    parts = [
        f"{facts['device']}, {facts['cores']} cores ({facts['cpu_capability']}), {facts['threads']} threads, "
        f"{facts['dtype']}, {facts['date']}, commit {facts['commit']}, load before {facts['load_before'][0]}; "
        f"torch {facts['torch']}, transformers {facts['transformers']}, peft {facts['peft']}, "
        f"accelerate {facts['accelerate']}; {result['warm_up']} steps to warm up, then medians of {result['pairs']} "
        f"pairs of {result['steps']} steps.",
        "",
        "| rows | virtual tokens | batch | ours, steps/s | PEFT and Trainer, steps/s | ratio | least to most "
        "| ratio of CPU time | losses apart: first step | any |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    parts += [
        f"| {line['data']} | {line['virtual']} | {line['batch']} | {line[OURS]:.3f} | {line[PEER]:.3f} "
        f"| {line['ratio']:.2f} | {line['least']:.2f} to {line['most']:.2f} | {line['cpu_ratio']:.2f} "
        f"| {line['first_apart']:.0e} | {line['most_apart']:.0e} |"
        for line in summary(result["settings"], result["steps"])
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--data", type=names, default=["sentiment_mixed", "address_parse"], help="of examples/data")
    parser.add_argument("--virtual", type=numbers, default=[20, 100], help="virtual tokens")
    parser.add_argument("--batch", type=numbers, default=[16, 32], help="rows a step")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each that are not timed")
    parser.add_argument("--steps", type=int, default=2, help="timed ones of a turn")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--template", default="{input}\n")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as SOFTPROMPT_MODEL")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mixed", action="store_true", help="both multiply in bfloat16, on a CPU that has it")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    base = load_base_model(
        arguments.model, cache_dir=default_cache_dir(), device=arguments.device, dtype=arguments.dtype
    )
    if arguments.mixed and product_dtype(base.model, "auto") == base.dtype:
        parser.error("--mixed is for float32 on a CPU that has bfloat16")
    facts = machine.describe()
    if facts["load_before"][0] > QUIET:
        say(f"the machine is busy (load {facts['load_before'][0]}): these numbers will say little")
    on_gpu = base.device.type == "cuda"
    facts |= {
        "threads": arguments.threads,
        "device": torch.cuda.get_device_name(base.device) if on_gpu else facts["cpu"],
        "dtype": str(base.dtype).removeprefix("torch.") + ", products in bfloat16" * arguments.mixed,
        **{module.__name__: module.__version__ for module in (transformers, peft, accelerate)},
    }
    result: dict[str, Any] = {
        "experiment": "training", "machine": facts, "template": arguments.template,
        "warm_up": arguments.warm_up, "pairs": arguments.pairs, "steps": arguments.steps,
    }  # fmt: skip

    def done(settings: list[dict[str, Any]]) -> None:
        result["settings"] = settings
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    measure(base, arguments, done)
    print(render(result))


if __name__ == "__main__":
    main()
