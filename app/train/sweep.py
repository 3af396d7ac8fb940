"""A learning rate by trial: short runs from the same start, of which the least validation loss wins."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from app.errors import TrainingFailed
from app.train.recipe import DEFAULT_LEARNING_RATES, Recipe
from app.train.report import TrainReport

FACTORS = (0.3, 1.0, 3.0)  # of the method's own rate
_STEPS = (5, 30)  # fewest and most of a trial
_SHARE = 6  # a trial has a sixth of the steps
_BUDGET_SHARE = 0.08  # of the time, each


def sweep(
    recipe: Recipe, folder: Path, run: Callable[[Recipe, Path], TrainReport]
) -> tuple[Recipe, list[dict[str, float]]]:
    """The recipe with the best rate, and with what the trials left of its budget; and how each trial did.

    `run` trains by a recipe in a folder and does not do twice what is done, so a sweep that was killed goes on.
    Raises TrainingFailed if no trial has a finite loss.
    """
    steps = min(recipe.max_steps, max(_STEPS[0], min(_STEPS[1], recipe.max_steps // _SHARE)))
    budget = recipe.budget_seconds
    trials: list[dict[str, float]] = []
    for number, factor in enumerate(FACTORS):
        rate = min(10.0, DEFAULT_LEARNING_RATES[recipe.method] * factor)
        trial = replace(
            recipe,
            learning_rate=rate,
            max_steps=steps,
            warmup_steps=min(recipe.warmup_steps, steps // 5),
            eval_every=steps,
            budget_seconds=None if budget is None else max(1.0, budget * _BUDGET_SHARE),
        )
        loss, begun = math.inf, time.monotonic()
        try:
            report = run(trial, folder / str(number))
            loss, seconds = report.best_validation_loss, report.seconds
        except TrainingFailed:
            seconds = time.monotonic() - begun  # it has blown up: the next one may as well, which the comparison shows
        trials.append({"learning_rate": rate, "validation_loss": loss, "seconds": seconds})
    best = min(trials, key=lambda trial: trial["validation_loss"])
    if not math.isfinite(best["validation_loss"]):
        raise TrainingFailed("no learning rate that was tried gives a finite loss")
    spent = sum(trial["seconds"] for trial in trials)
    left = None if budget is None else max(1.0, budget - spent)
    # A loss that is not finite is no JSON.
    told = [trial for trial in trials if math.isfinite(trial["validation_loss"])]
    return replace(recipe, learning_rate=best["learning_rate"], budget_seconds=left), told
