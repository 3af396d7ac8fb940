"""The learning rate of every step, and how many steps a budget has room for."""

from __future__ import annotations

import math

from app.train.recipe import Recipe

PROBE_STEPS = 5  # until the first plan; the first of them is slower and does not count
_RESERVE = 0.97  # of the budget is planned for: steps are not all alike
_VALIDATION = 0.4  # time of a batch without its gradients, in that of a step; until it has been measured


def learning_rate(recipe: Recipe, step: int, total: int | None = None) -> float:
    """Rate of the step after `step` finished ones: linear warm-up, then a cosine down to zero at `total`.

    `total` is `max_steps` unless a budget has lowered it, and with it the warm-up.
    """
    assert isinstance(recipe.learning_rate, float | int)  # "auto" has become a number before the first step
    warmup = recipe.warmup_steps
    if total is None or total >= recipe.max_steps:
        total = recipe.max_steps
    else:
        warmup = min(warmup, total // 5)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def first_plan(recipe: Recipe, num_validation_rows: int, step: int, seconds: float, seconds_a_step: float) -> int:
    """Steps that there will be, from those at the beginning, before a validation has been measured."""
    batches = math.ceil(num_validation_rows / recipe.batch_size)
    return _plan(recipe, step, seconds, seconds_a_step * (1 + _VALIDATION * batches / recipe.eval_every))


def next_plan(recipe: Recipe, step: int, seconds: float, start_seconds: float = 0.0) -> int:
    """Steps that there will be, from all so far with their validations. `start_seconds` came before them."""
    return _plan(recipe, step, seconds, (seconds - start_seconds) / step)


def _plan(recipe: Recipe, step: int, seconds: float, seconds_a_step: float) -> int:
    assert recipe.budget_seconds is not None
    left = recipe.budget_seconds * _RESERVE - seconds
    return max(step, min(recipe.max_steps, step + int(left / seconds_a_step)))
