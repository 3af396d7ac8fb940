"""The training loop: one method's parameters, AdamW, and a state that can be put away between any two steps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.errors import TrainingFailed
from app.train.checkpoint import Progressed, save_checkpoint, sync
from app.train.data import Example, batches
from app.train.forward import Batch, answer_nll, micro_batches
from app.train.initial import embedding_weight
from app.train.methods import PEFT_FILES, Method
from app.train.methods.method import on_cpu
from app.train.recipe import Recipe
from app.train.report import Progress
from app.train.schedule import PROBE_STEPS, first_plan, learning_rate, next_plan

# AdamW's usual 0.999 remembers a thousand steps; a whole run here is a few hundred
_BETAS = (0.9, 0.99)
# of polynomial-decay averaging: the mean is over about the last tenth of the steps so far
_AVERAGE_POWER = 8


class Loop:
    """The model, a method and its optimizer during one `train` call."""

    def __init__(
        self, model: PreTrainedModel, method: Method, recipe: Recipe, *, shared: bool = False, is_mixed: bool = False
    ) -> None:
        """`shared` and `is_mixed` are those of `answer_nll`."""
        self.model, self.method, self.recipe, self.shared = model, method, recipe, shared
        self.is_mixed = is_mixed
        self.device = embedding_weight(model).device
        groups = method.groups()
        self.scales = [group.scale for group in groups]
        self.parameters = dict(method.named_parameters())
        found = [parameter for group in groups for parameter in group.parameters]
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.trained = {names[id(parameter)]: parameter for parameter in found}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in self.trained)
        self.average = self._trained_state()
        # times the norm of a gradient: that of a parameter in its own unit
        self.units = torch.tensor([group.scale for group in groups for _ in group.parameters], device=self.device)
        self.optimizer = torch.optim.AdamW(
            [{"params": group.parameters} for group in groups],
            lr=1.0,
            betas=_BETAS,
            weight_decay=recipe.weight_decay,
        )

    def begin(self) -> Progressed:
        """Nothing done yet; the best prompt so far is the initial one."""
        return Progressed(self._method_state(), self.method.tensors())

    def measure_start(self, state: Progressed, held_out: list[Example]) -> None:
        """Validate the initial prompt, which is kept if no step is better. It is no step and in no checkpoint alone."""
        begun = time.monotonic()
        state.note(self._validate(held_out), state.best)
        state.seconds = state.start_seconds = time.monotonic() - begun

    def restore(self, state: Progressed) -> None:
        self.method.load_state_dict(state.method)
        self.average = self._trained_state()
        if state.step:
            for name, average in state.average.items():
                self.average[name].copy_(average)
            for name, parameter in self.trained.items():
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(state.step)),
                    "exp_avg": state.exp_avg[name].to(self.device),
                    "exp_avg_sq": state.exp_avg_sq[name].to(self.device),
                }

    def run(
        self,
        state: Progressed,
        examples: list[Example],
        held_out: list[Example],
        work: Path,
        identity: str,
        on_progress: Callable[[Progress], None] | None,
    ) -> str:
        """Step until the last one or no improvement, moving `state` along; returns why it ended."""
        recipe = self.recipe
        source = _batches_from(examples, recipe, state.step)
        durations: list[float] = []
        mark = time.monotonic()
        while state.step < _total(recipe, state) and state.stale < recipe.patience:
            if state.step and _is_spent(recipe, state):  # one step is made in any case: the start alone is no training
                break
            rate = learning_rate(recipe, state.step, _total(recipe, state))
            batch_examples = next(source)
            loss = self._step(batch_examples, rate, state.step + 1)
            state.step += 1
            state.trained_tokens += sum(len(example.ids) for example in batch_examples)
            state.losses.append(loss)
            now = time.monotonic()
            durations, state.seconds, mark = [*durations, now - mark][-PROBE_STEPS:], state.seconds + now - mark, now
            if recipe.budget_seconds is not None and state.planned_steps is None and len(durations) == PROBE_STEPS:
                typical = sorted(durations[1:])[len(durations) // 2 - 1]
                state.planned_steps = first_plan(recipe, len(held_out), state.step, state.seconds, typical)
            validation = None
            is_last = state.step == _total(recipe, state) or _is_spent(recipe, state)
            if state.step % recipe.eval_every == 0 or is_last:
                with self._averaged():
                    validation = self._validate(held_out)
                    state.note(validation, self.method.tensors())
                now = time.monotonic()
                state.seconds, mark = state.seconds + now - mark, now
                if recipe.budget_seconds is not None and not is_last:
                    state.planned_steps = next_plan(recipe, state.step, state.seconds, state.start_seconds)
            is_saved = state.step % recipe.checkpoint_every == 0 or validation is not None
            if is_saved:
                self._save(state, work, identity)
            if on_progress is not None:
                progress = Progress(
                    step=state.step,
                    max_steps=_total(recipe, state),
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
        if state.step == recipe.max_steps:
            return "max_steps"
        return "no improvement" if state.stale >= recipe.patience else "budget"

    def _method_state(self) -> dict[str, Tensor]:
        return {name: on_cpu(tensor) for name, tensor in self.method.state_dict().items()}

    def _trained_state(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def _note_average(self, step: int) -> None:
        """Let the parameters after `step` (1, 2, ...) into their average.

        A recent step counts for more (polynomial-decay averaging: Shamir & Zhang 2013, arXiv:1212.1824), but
        never for less than in an exponential average over `average_steps`. The mean of points around a minimum is
        nearer to it than each of them (Izmailov et al. 2018, arXiv:1803.05407).
        """
        share = max(1 / self.recipe.average_steps, (_AVERAGE_POWER + 1) / (step + _AVERAGE_POWER))
        torch._foreach_lerp_(list(self.average.values()), list(self.trained.values()), share)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The method with the averages of its parameters in their place."""
        last = self._trained_state()
        try:
            self._set(self.average)
            yield
        finally:
            self._set(last)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(values[name])

    def _save(self, state: Progressed, work: Path, identity: str) -> None:
        adam = {name: self.optimizer.state[parameter] for name, parameter in self.trained.items()}
        state.method = self._method_state()
        state.average = {name: on_cpu(tensor) for name, tensor in self.average.items()}
        state.exp_avg = {name: on_cpu(moments["exp_avg"]) for name, moments in adam.items()}
        state.exp_avg_sq = {name: on_cpu(moments["exp_avg_sq"]) for name, moments in adam.items()}
        save_checkpoint(work, identity, state)

    def _step(self, examples: list[Example], rate: float, number: int) -> float:
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = rate * scale
        self.optimizer.zero_grad()
        count = sum(len(example.ids) - example.start for example in examples)
        losses = []
        for part in self._parts(examples):
            total = self._nll(self.method.prompt(), part).sum()
            (total / count).backward()  # type: ignore[no-untyped-call]
            losses.append(total.detach() / count)
        norm = self._clip()
        self.optimizer.step()
        self.method.constrain()
        self._note_average(number)
        # One wait for the device a step, when all of it has been queued. What a bad step spoilt is thrown away.
        found, size = torch.stack([torch.stack(losses).sum(), norm]).tolist()
        if not (math.isfinite(found) and math.isfinite(size)):
            raise TrainingFailed(
                f"the loss is not finite at step {number} (loss {found}, gradient norm {size}); "
                f"a learning_rate below {self.recipe.learning_rate} may help"
            )
        return float(found)

    def _nll(self, prompt: Tensor, part: Sequence[Example]) -> Tensor:
        batch = Batch.of(part, self.device)
        return answer_nll(self.model, prompt, batch, shared=self.shared, is_mixed=self.is_mixed)

    def _parts(self, examples: list[Example]) -> list[Sequence[Example]]:
        """What fits into one forward. A shared prompt is not run again for each row, but its keys and values are there.

        They keep a seventh of what a token does (SmolLM2-135M), without groups of heads up to two fifths.
        """
        count = self.recipe.num_virtual_tokens
        return micro_batches(examples, before=count // 2 if self.shared else count)

    def _clip(self) -> Tensor:
        """Clip the gradients, each in the inverse of its parameter's unit; returns their norm before."""
        gradients = [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]
        norm: Tensor = (torch.stack(torch._foreach_norm(gradients)) * self.units).norm()
        torch._foreach_mul_(gradients, (self.recipe.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def _validate(self, examples: list[Example]) -> float:
        totals, count = [], 0
        ordered = sorted(examples, key=lambda example: len(example.ids))
        prompt = self.method.prompt()
        for first in range(0, len(ordered), self.recipe.batch_size):
            for part in self._parts(ordered[first : first + self.recipe.batch_size]):
                losses = self._nll(prompt, part)
                totals.append(losses.sum())
                count += len(losses)
        mean = math.fsum(torch.stack(totals).tolist()) / count
        if not math.isfinite(mean):
            raise TrainingFailed(f"the validation loss is {mean}")
        return mean

    def publish(self, state: Progressed, out_dir: Path, work: Path, base_name: str) -> None:
        """Write to a work folder first; the configuration moves last, so it marks a whole pair."""
        made = work / "peft"
        self.method.save(made, state.best, base_name=base_name)
        for name in PEFT_FILES:
            sync(made / name)
            os.replace(made / name, out_dir / name)
        sync(out_dir)


def _total(recipe: Recipe, state: Progressed) -> int:
    return recipe.max_steps if state.planned_steps is None else state.planned_steps


def _is_spent(recipe: Recipe, state: Progressed) -> bool:
    return recipe.budget_seconds is not None and state.seconds >= recipe.budget_seconds


def _batches_from(examples: list[Example], recipe: Recipe, step: int) -> Iterator[list[Example]]:
    lengths = [len(example.ids) for example in examples]
    epoch, skip = divmod(step, math.ceil(len(examples) / recipe.batch_size))
    while True:
        for indices in batches(lengths, recipe.batch_size, recipe.seed, epoch)[skip:]:
            yield [examples[i] for i in indices]
        epoch, skip = epoch + 1, 0
