"""The training loop: a frozen base, one trainable soft prompt, resumable to the same result.

PEFT builds and saves the prompt, so the files stay readable by PEFT; the loop is ours.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.errors import InvalidRecipe, InvalidTrainingData, TrainingFailed
from app.text import Template
from app.train.checkpoint import Progressed, load_checkpoint, save_checkpoint, sync
from app.train.data import Example, Row, batches, count_shared, digest, encode, hold_out
from app.train.forward import Batch, answer_nll, can_share
from app.train.initial import embedding_rms, embedding_weight, initial_prompt
from app.train.recipe import Recipe
from app.train.report import REPORT_FILE, Progress, TrainReport

# AdamW's usual 0.999 remembers a thousand steps; a whole run here is a few hundred
_BETAS = (0.9, 0.99)
_PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")


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
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainReport:
    """Train one soft prompt and leave adapter_config.json and adapter_model.safetensors in out_dir.

    Prompt tuning (Lester et al. 2021, arXiv:2104.08691), with the loss on the answer tokens only.
    `model` stays as it is except that its parameters no longer require gradients. Without
    validation rows a tenth of the training rows is held out. `initial` [virtual tokens, hidden] is where
    the prompt begins (transfer from another task; Vu et al. 2022, arXiv:2110.07904), by default what the
    recipe says. The prompt kept is the one with the least validation loss. A run that was killed goes
    on from `out_dir/checkpoint` to the result it would have had, and one that had finished is not done
    twice; with `resume=False`, or when anything that shapes the result has changed, it begins again.
    Whatever `on_progress` raises ends the run and is passed on, which is how a job is stopped; that
    step is in the checkpoint, which stays.

    Raises InvalidTrainingData and InvalidRecipe before any work, TrainingFailed when the loss is
    not finite; nothing is published then.
    """
    if not rows_validation:
        rows_train, rows_validation = hold_out(rows_train, recipe.seed)
    if not rows_train:
        raise InvalidTrainingData("no training rows")
    limit = _text_limit(model, recipe)
    examples = encode(rows_train, tokenizer, template, limit)
    held_out = encode(rows_validation, tokenizer, template, limit)
    sample = random.Random(f"validation {recipe.seed}")
    held_out = sample.sample(held_out, min(recipe.eval_rows, len(held_out)))
    notes = []
    if shared_rows := count_shared(rows_train, rows_validation):
        notes.append(f"{shared_rows} validation rows have an input that is also trained on")

    run = _Run(model, tokenizer, recipe, base_name, initial)
    data_digest = digest(rows_train, rows_validation)
    identity = _identity(model, recipe, [base_name, base_fingerprint], template, data_digest, initial)
    work = out_dir / "checkpoint"
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    elif all((out_dir / name).is_file() for name in _PEFT_FILES) and (finished := TrainReport.load(out_dir, identity)):
        return finished
    (out_dir / REPORT_FILE).unlink(missing_ok=True)  # it speaks of files that are about to change
    work.mkdir(parents=True, exist_ok=True)
    state = load_checkpoint(work, identity) or Progressed.start(run.prompt)

    was_training = model.training
    model.train(False)  # no dropout: the prompt must fit the model that will serve it
    try:
        # before `restore`: a resumed run must choose the forward that the first part chose
        run.shared = can_share(model, run.prompt, examples)
        run.restore(state)
        stopped = run.loop(state, examples, held_out, work, identity, on_progress)
    finally:
        model.train(was_training)
    run.publish(state.best_prompt, out_dir, work)
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
        recipe=recipe.as_dict(),
        warnings=notes,
    )
    report.save(out_dir, identity)
    shutil.rmtree(work)
    return report


class _Run:
    """The model, its prompt and its optimizer during one `train` call."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        base_name: str,
        initial: Tensor | None,
    ) -> None:
        self.model, self.recipe = model, recipe
        self.device = embedding_weight(model).device
        self.shared = False
        config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=recipe.num_virtual_tokens)
        # PEFT draws an initialisation we do not use, and calls what transformers 5 deprecates
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            self.peft_model: PeftModel = get_peft_model(model, config)
        # PEFT put the model's folder here; a published file must not tell where it was made
        self.peft_model.peft_config["default"].base_model_name_or_path = base_name
        encoder: Any = self.peft_model.prompt_encoder
        self.prompt: Tensor = encoder["default"].embedding.weight  # [virtual tokens, hidden]
        trainable = [p for p in self.peft_model.parameters() if p.requires_grad]
        if len(trainable) != 1 or trainable[0] is not self.prompt:
            raise TrainingFailed("the base model is not frozen")
        self.scale = embedding_rms(model)
        with torch.no_grad():
            self.prompt.copy_(initial_prompt(model, tokenizer, recipe) if initial is None else initial)
        self.optimizer = torch.optim.AdamW([self.prompt], lr=1.0, betas=_BETAS, weight_decay=recipe.weight_decay)

    def restore(self, state: Progressed) -> None:
        with torch.no_grad():
            self.prompt.copy_(state.prompt)
        if state.step:
            self.optimizer.state[self.prompt] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": state.exp_avg.to(self.device),
                "exp_avg_sq": state.exp_avg_sq.to(self.device),
            }

    def loop(
        self,
        state: Progressed,
        examples: list[Example],
        held_out: list[Example],
        work: Path,
        identity: str,
        on_progress: Callable[[Progress], None] | None,
    ) -> str:
        """Step until `max_steps` or no improvement, moving `state` along; returns which it was."""
        recipe = self.recipe
        source = _batches_from(examples, recipe, state.step)
        mark = time.monotonic()
        while state.step < recipe.max_steps and state.stale < recipe.patience:
            rate = learning_rate(recipe, state.step) * self.scale
            batch_examples = next(source)
            loss = self._step(batch_examples, rate, state.step + 1)
            state.step += 1
            state.trained_tokens += sum(len(example.ids) for example in batch_examples)
            state.losses.append(loss)
            validation = None
            if state.step % recipe.eval_every == 0 or state.step == recipe.max_steps:
                validation = self._validate(held_out)
                state.note(validation, self.prompt)
            now = time.monotonic()
            state.seconds, mark = state.seconds + now - mark, now
            is_saved = state.step % recipe.checkpoint_every == 0 or validation is not None
            if is_saved:
                self._save(state, work, identity)
            if on_progress is not None:
                progress = Progress(
                    step=state.step,
                    max_steps=recipe.max_steps,
                    train_loss=loss,
                    validation_loss=validation,
                    best_step=state.best_step,
                    learning_rate=rate,
                    trained_tokens=state.trained_tokens,
                    seconds=state.seconds,
                )
                try:
                    on_progress(progress)
                except BaseException:
                    if not is_saved:
                        self._save(state, work, identity)
                    raise
        return "max_steps" if state.step == recipe.max_steps else "no improvement"

    def _save(self, state: Progressed, work: Path, identity: str) -> None:
        adam = self.optimizer.state[self.prompt]
        state.keep(self.prompt, adam["exp_avg"], adam["exp_avg_sq"])
        save_checkpoint(work, identity, state)

    def _step(self, examples: list[Example], rate: float, number: int) -> float:
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        batch = Batch.of(examples, self.device)
        loss = answer_nll(self.model, self.prompt, batch, shared=self.shared).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_([self.prompt], self.recipe.max_grad_norm / self.scale)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise TrainingFailed(
                f"the loss is not finite at step {number} (loss {loss.item()}, gradient norm "
                f"{norm.item()}); a learning_rate below {self.recipe.learning_rate} may help"
            )
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def _validate(self, examples: list[Example]) -> float:
        total, count = 0.0, 0
        ordered = sorted(examples, key=lambda example: len(example.ids))
        for first in range(0, len(ordered), self.recipe.batch_size):
            batch = Batch.of(ordered[first : first + self.recipe.batch_size], self.device)
            losses = answer_nll(self.model, self.prompt, batch, shared=self.shared)
            total, count = total + losses.double().sum().item(), count + len(losses)
        mean = total / count
        if not math.isfinite(mean):
            raise TrainingFailed(f"the validation loss is {mean}")
        return mean

    def publish(self, prompt: Tensor, out_dir: Path, work: Path) -> None:
        """PEFT writes to a work folder; the configuration moves last, so it marks a whole pair."""
        with torch.no_grad():
            self.prompt.copy_(prompt)
        made = work / "peft"
        # save_embedding_layers=False: "auto" asks a hub about the base's vocabulary
        self.peft_model.save_pretrained(str(made), save_embedding_layers=False)
        for name in _PEFT_FILES:
            sync(made / name)
            os.replace(made / name, out_dir / name)
        sync(out_dir)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Rate of the step after `step` finished ones: linear warm-up, then a cosine down to zero."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / (recipe.warmup_steps + 1)
    done = (step - recipe.warmup_steps) / (recipe.max_steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def _batches_from(examples: list[Example], recipe: Recipe, step: int) -> Iterator[list[Example]]:
    lengths = [len(example.ids) for example in examples]
    epoch, skip = divmod(step, math.ceil(len(examples) / recipe.batch_size))
    while True:
        for indices in batches(lengths, recipe.batch_size, recipe.seed, epoch)[skip:]:
            yield [examples[i] for i in indices]
        epoch, skip = epoch + 1, 0


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
        parts.append(hashlib.sha256(initial.float().contiguous().numpy().tobytes()).hexdigest())
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
