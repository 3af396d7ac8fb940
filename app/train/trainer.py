"""Train one soft prompt on a frozen base, resumable to the same result, and leave it as PEFT files."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.errors import InvalidRecipe, InvalidTrainingData
from app.text import Template
from app.train.checkpoint import load_checkpoint
from app.train.data import Row, count_shared, digest, encode, hold_out, task_names
from app.train.forward import can_share
from app.train.initial import embedding_rms, embedding_weight
from app.train.loop import Loop
from app.train.methods import PEFT_FILES, Setup, build
from app.train.methods.method import on_cpu
from app.train.precision import product_dtype
from app.train.recipe import Recipe
from app.train.report import REPORT_FILE, Progress, TrainReport
from app.train.sweep import sweep


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows_train: Sequence[Row],
    rows_validation: Sequence[Row],
    template: Template,
    recipe: Recipe,
    out_dir: Path,
    *,
    base_name: str,
    base_fingerprint: str = "",
    initial: Tensor | None = None,
    resume: bool = True,
    measure_start: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainReport:
    """Train one soft prompt and leave adapter_config.json and adapter_model.safetensors in out_dir.

    By the recipe's method (app.train.methods), with the loss on the answer tokens only.
    `model` stays as it is except that its parameters no longer require gradients; meanwhile no other thread may
    use it. Without
    validation rows a tenth of the training rows is held out. `initial` is where the prompt begins,
    [virtual tokens, hidden] or for methods of keys and values [layers, 2, KV heads, virtual tokens, head_dim] too
    (transfer from another task; Vu et al. 2022, arXiv:2110.07904), by default what the
    recipe says. The prompt kept is the one with the least validation loss, which may be the initial one
    (step 0) unless `measure_start` is off, as it is for trials. A run that was killed goes
    on from `out_dir/checkpoint` to the result it would have had, and one that had finished is not done
    twice; with `resume=False`, or when anything that shapes the result has changed, it begins again.
    Whatever `on_progress` raises ends the run and is passed on, which is how a job is stopped; that
    step is in the checkpoint, which stays. While learning rates are tried it is given step 0.

    Raises InvalidTrainingData and InvalidRecipe before any work, TrainingFailed when the loss is
    not finite; nothing is published then.
    """
    tasks = task_names(rows_train) if recipe.method == "multitask_prompt_tuning" else None
    if not rows_validation:
        rows_train, rows_validation = hold_out(rows_train, by_task=tasks is not None)
    if not rows_train:
        raise InvalidTrainingData("no training rows")
    if initial is not None and recipe.init not in (None, "prompt"):
        raise InvalidRecipe(f"init is {recipe.init}, and there is a prompt to start from", param="init")
    limit = _text_limit(model, recipe)
    examples = encode(rows_train, tokenizer, template, limit, tasks)
    held_out = encode(rows_validation, tokenizer, template, limit, tasks)
    sample = random.Random(f"validation {recipe.seed}")
    held_out = sample.sample(held_out, min(recipe.eval_rows, len(held_out)))
    notes = []
    if shared_rows := count_shared(rows_train, rows_validation):
        notes.append(f"{shared_rows} validation rows have an input that is also trained on")

    data_digest = digest(rows_train, rows_validation)
    products = product_dtype(model, recipe.precision)
    is_mixed = products != embedding_weight(model).dtype
    base = [base_name, base_fingerprint, str(products)]
    identity = _identity(model, recipe, base, template, data_digest, initial)
    work = out_dir / "checkpoint"
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    elif all((out_dir / name).is_file() for name in PEFT_FILES) and (finished := TrainReport.load(out_dir, identity)):
        return finished
    (out_dir / REPORT_FILE).unlink(missing_ok=True)  # it speaks of files that are about to change
    work.mkdir(parents=True, exist_ok=True)

    was_training = model.training
    model.train(False)  # no dropout: the prompt must fit the model that will serve it
    model.requires_grad_(False)
    try:
        setup = Setup(
            model=model,
            tokenizer=tokenizer,
            recipe=recipe,
            template=template,
            rows=rows_train,
            tasks=tasks or ("",),
            initial=initial,
        )
        method = build(setup)
        chosen = recipe
        trials: list[dict[str, float]] = []
        if recipe.learning_rate == "auto":
            trial = partial(
                train,
                model,
                tokenizer,
                rows_train,
                rows_validation,
                template,
                base_name=base_name,
                base_fingerprint=base_fingerprint,
                initial=initial,
                measure_start=False,
                on_progress=_without_steps(recipe, on_progress),
            )
            chosen, trials = sweep(recipe, work / "rates", trial)
        # before `restore`: a resumed run must choose the forward that the first part chose
        with torch.no_grad():
            shared = can_share(model, method.prompt(), examples)
        loop = Loop(model, method, chosen, shared=shared, is_mixed=is_mixed)
        state = load_checkpoint(work, identity) or loop.begin()
        loop.restore(state)
        if measure_start and not state.step:
            loop.measure_start(state, held_out)
        stopped = loop.run(state, examples, held_out, work, identity, on_progress)
    finally:
        model.train(was_training)
    if not state.best_step:
        notes.append("the start was kept: no step was better on the validation rows")
    loop.publish(state, out_dir, work, base_name)
    report = TrainReport(
        steps=state.step,
        best_step=state.best_step,
        best_validation_loss=state.best_loss,
        curve=state.curve,
        stopped=stopped,
        seconds=round(state.seconds, 3),
        trained_tokens=state.trained_tokens,
        train_rows=len(rows_train),
        validation_rows=len(rows_validation),
        data_digest=data_digest,
        seed=recipe.seed,
        template=template.text,
        base_name=base_name,
        recipe=replace(recipe, learning_rate=chosen.learning_rate).as_dict(),
        warnings=notes,
        precision=str(products).removeprefix("torch."),
        tasks=tasks or [],
        trials=trials,
    )
    report.save(out_dir, identity)
    shutil.rmtree(work)
    return report


def _without_steps(recipe: Recipe, on_progress: Callable[[Progress], None] | None) -> Callable[[Progress], None] | None:
    """For trials: whoever follows a run learns that it lives, and may stop it, but sees no step of it yet."""
    if on_progress is None:
        return None
    tell = on_progress
    return lambda progress: tell(
        replace(progress, step=0, max_steps=recipe.max_steps, validation_loss=None, best_step=0)
    )


def _text_limit(model: PreTrainedModel, recipe: Recipe) -> int:
    context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return recipe.max_length
    if context <= recipe.num_virtual_tokens + 1:
        raise InvalidRecipe(
            f"num_virtual_tokens must be below the model's context less 1 ({context - 1}), "
            f"not {recipe.num_virtual_tokens}",
            param="num_virtual_tokens",
        )
    return min(recipe.max_length, context - recipe.num_virtual_tokens)


def _identity(
    model: PreTrainedModel,
    recipe: Recipe,
    base: list[str],
    template: Template,
    data_digest: str,
    initial: Tensor | None,
) -> str:
    """Everything that shapes the result; a checkpoint of another run is not continued."""
    weight = embedding_weight(model)
    parts: list[Any] = [recipe.as_dict(), *base, template.text, data_digest]
    parts += [model.num_parameters(), list(weight.shape), str(weight.dtype), embedding_rms(model)]
    if initial is not None:
        parts.append(hashlib.sha256(on_cpu(initial).numpy().tobytes()).hexdigest())
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
