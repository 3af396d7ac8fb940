"""From the body of a fine-tuning request to what is trained: hyperparameters become a recipe."""

from __future__ import annotations

from typing import Any

from app.api.openai.fine_tuning_schemas import Hyperparameters, JobRequest, PromptTuning
from app.errors import InvalidRequest
from app.jobs import Options
from app.registry.reference import check_alias_name
from app.text import Template
from app.train.recipe import Recipe

_SAME = ("num_virtual_tokens", "max_steps", "eval_every", "patience", "max_length")  # the recipe's fields of that name


def options_of(body: JobRequest, num_virtual_tokens: int | None) -> Options:
    """`num_virtual_tokens` is that of the prompt to start from. Raises InvalidRequest and InvalidRecipe."""
    tuning = (body.method and body.method.prompt_tuning) or PromptTuning()
    given = _hyperparameters(body)
    epochs = given.pop("n_epochs", None)
    recipe: dict[str, Any] = {name: given[name] for name in _SAME if name in given}
    if "batch_size" in given:
        recipe["batch_size"] = given["batch_size"]
    if "learning_rate_multiplier" in given:
        recipe["learning_rate"] = Recipe.learning_rate * given["learning_rate_multiplier"]
    if "max_steps" in recipe:
        recipe["warmup_steps"] = min(Recipe.warmup_steps, recipe["max_steps"] - 1)
    if num_virtual_tokens is not None:
        if recipe.setdefault("num_virtual_tokens", num_virtual_tokens) != num_virtual_tokens:
            raise InvalidRequest(
                f"the prompt to start from has {num_virtual_tokens} virtual tokens", param="num_virtual_tokens"
            )
        if tuning.init_text:
            raise InvalidRequest("a job starts from a text or from another prompt, not both", param="init_text")
    recipe["init_text"] = tuning.init_text
    Recipe(**recipe, seed=body.seed or 0)
    if tuning.template is not None:
        Template(tuning.template)
    if tuning.alias:
        check_alias_name(tuning.alias)
    return Options(
        recipe=recipe,
        num_epochs=epochs,
        template=tuning.template,
        classify=tuning.classify,
        max_tokens=tuning.max_tokens,
        stop=tuning.stop,
        description=tuning.description,
        alias=tuning.alias,
        gate=tuning.gate,
    )


def shown(body: JobRequest) -> dict[str, Any]:
    """What was asked, as replies repeat it."""
    given = _hyperparameters(body)
    three = {name: given.get(name, "auto") for name in Hyperparameters.model_fields}
    tuning = (body.method and body.method.prompt_tuning) or PromptTuning()
    told = tuning.model_dump(exclude={"hyperparameters"}) | {"hyperparameters": three | given}
    return {"hyperparameters": three, "method": {"type": "prompt_tuning", "prompt_tuning": told}}


def _hyperparameters(body: JobRequest) -> dict[str, Any]:
    """Those that are not left to us; the method's win over the older place."""
    places: list[Hyperparameters | None] = [body.hyperparameters]
    if body.method is not None:
        for chosen in (body.method.supervised, body.method.prompt_tuning):
            places.append(chosen.hyperparameters if chosen is not None else None)
    found: dict[str, Any] = {}
    for place in places:
        if place is not None:
            found |= {name: value for name, value in place.model_dump().items() if value not in (None, "auto")}
    return found
