"""From the body of a fine-tuning request to what is trained: hyperparameters become a recipe."""

from __future__ import annotations

from typing import Any

from app.api.openai.fine_tuning_schemas import Hyperparameters, JobRequest, PromptTuning
from app.errors import InvalidRequest
from app.jobs import Options
from app.registry.reference import check_alias_name
from app.text import Template
from app.train.recipe import DEFAULT_LEARNING_RATES, MethodName, Recipe

# the recipe's fields of that name
_SAME = """
    batch_size num_virtual_tokens max_steps eval_every patience max_length learning_rate budget_seconds
    residual_size encoder encoder_hidden_size num_ranks num_frozen_tokens cpt_epsilon precision
""".split()
_MAX_STEPS = 100_000  # where a budget is what ends it


def method_of(body: JobRequest) -> MethodName:
    return "prompt_tuning" if body.method is None else body.method.name


def options_of(body: JobRequest, num_virtual_tokens: int | None) -> Options:
    """`num_virtual_tokens` is that of the prompt to start from. Raises InvalidRequest and InvalidRecipe."""
    tuning, method = _tuning(body), method_of(body)
    given = _hyperparameters(body)
    epochs = given.pop("n_epochs", None)
    recipe: dict[str, Any] = {"method": method, "residual": tuning.residual}
    recipe |= {name: given[name] for name in _SAME if name in given}
    if "learning_rate_multiplier" in given:
        if "learning_rate" in given:
            raise InvalidRequest("learning_rate is there already", param="learning_rate_multiplier")
        recipe["learning_rate"] = DEFAULT_LEARNING_RATES[method] * given["learning_rate_multiplier"]
    if "budget_seconds" in recipe and epochs is None:
        recipe.setdefault("max_steps", _MAX_STEPS)
    if "max_steps" in recipe:
        recipe["warmup_steps"] = min(Recipe.warmup_steps, recipe["max_steps"] - 1)
    if num_virtual_tokens is not None:
        if recipe.setdefault("num_virtual_tokens", num_virtual_tokens) != num_virtual_tokens:
            raise InvalidRequest(
                f"the prompt to start from has {num_virtual_tokens} virtual tokens", param="num_virtual_tokens"
            )
        if tuning.init_text:
            raise InvalidRequest("a job starts from a text or from another prompt, not both", param="init_text")
        if tuning.init not in (None, "prompt") or method == "cpt":
            raise InvalidRequest("a job that starts from another prompt has no other start", param="init")
        recipe["init"] = "prompt"
    elif tuning.init == "prompt":
        raise InvalidRequest("the prompt to start from is the model", param="init")
    else:
        recipe |= {"init": tuning.init, "init_text": tuning.init_text}
    if tuning.for_task is not None and method != "multitask_prompt_tuning":
        raise InvalidRequest("only multitask_prompt_tuning trains several tasks", param="for_task")
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
        for_task=tuning.for_task,
    )


def shown(body: JobRequest) -> dict[str, Any]:
    """What was asked, as replies repeat it."""
    given = _hyperparameters(body)
    three = {name: given.get(name, "auto") for name in Hyperparameters.model_fields}
    told = _tuning(body).model_dump(exclude={"hyperparameters"}) | {"hyperparameters": three | given}
    return {"hyperparameters": three, "method": {"type": method_of(body), method_of(body): told}}


def _tuning(body: JobRequest) -> PromptTuning:
    return (body.method and body.method.tuning) or PromptTuning()


def _hyperparameters(body: JobRequest) -> dict[str, Any]:
    """Those that are not left to us; the method's win over the older place."""
    places: list[Hyperparameters | None] = [body.hyperparameters]
    if body.method is not None:
        for chosen in (body.method.supervised, body.method.tuning):
            places.append(chosen.hyperparameters if chosen is not None else None)
    found: dict[str, Any] = {}
    for place in places:
        if place is not None:
            found |= {
                name: value
                for name, value in place.model_dump().items()
                if value is not None and (value != "auto" or name == "learning_rate")  # where it is no default
            }
    return found
