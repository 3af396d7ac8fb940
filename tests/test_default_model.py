"""The shipped prompts on the real base: rows of every task and of the bare base in one batch, held to PEFT alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from app.base_model import BaseModel
from app.registry import Registry, Store
from app.soft_prompt import SoftPrompt
from tests.core_harness import BACKENDS, Harness
from tests.peft_oracle import oracle_logits
from tests.shipped import PROMPTS, SHIPPED

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")]

TOLERANCE = 1e-3
NEW_TOKENS = 8
INPUTS = (
    "I love my team.",
    "901 Hamlet St, Evanston, IL 60202",
    "how much money is in my checking account, and what was the last thing that I bought with it",
)


@cache
def peft_alone(model: PreTrainedModel, folder: Path | None, token_ids: tuple[int, ...]) -> torch.Tensor:
    """Once, whatever is held to it."""
    return oracle_logits(model, folder, list(token_ids))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shipped_prompts_equal_peft_alone(
    backend: str, default_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = default_base
    registry = Registry(Store(PROMPTS), base.info)
    harness = Harness(base.model, base.info, monkeypatch, backend=backend)
    rows = []
    for number, name in enumerate([*SHIPPED, None, *SHIPPED, None]):
        pin = registry.pin(f"{name}:1") if name else None
        text = INPUTS[number % len(INPUTS)]
        if pin is not None:
            text = pin.version.manifest.parsed_template.prompt(text)
        token_ids = base.tokenizer(text)["input_ids"]
        harness.add(pin.prompt if pin else None, token_ids, max_tokens=NEW_TOKENS)
        rows.append((name, pin, token_ids))
    harness.run()
    for number, (name, pin, token_ids) in enumerate(rows):
        folder = PROMPTS / name / "versions" / str(pin.version.number) if name and pin else None
        generated = harness.ids(number)
        assert len(generated) == NEW_TOKENS
        expected = peft_alone(base.model, folder, (*token_ids, *generated))
        harness.assert_equals(number, token_ids, expected)
    harness.assert_clean()


def test_embedding_rows_of_real_tokens_equal_the_tokens_as_text(
    default_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = default_base
    virtual = base.tokenizer("Decide whether the text is positive or negative.")["input_ids"]
    prompt = SoftPrompt("embedding", base.model.get_input_embeddings().weight[virtual].detach(), "sha256:text")
    harness = Harness(base.model, base.info, monkeypatch)
    for text in INPUTS:
        token_ids = base.tokenizer(text)["input_ids"]
        harness.add(prompt, token_ids, max_tokens=NEW_TOKENS)
        harness.add(None, virtual + token_ids, max_tokens=NEW_TOKENS)
    harness.run()
    for number in range(len(INPUTS)):
        assert harness.ids(2 * number) == harness.ids(2 * number + 1)
        for ours, theirs in zip(harness.logits[2 * number], harness.logits[2 * number + 1], strict=True):
            assert (ours - theirs).abs().max() < TOLERANCE


def test_every_shipped_prompt_was_trained_on_this_base_and_says_how_good_it_is(default_base: BaseModel) -> None:
    registry = Registry(Store(PROMPTS), default_base.info)
    for name in SHIPPED:
        manifest = registry.resolve(name).manifest
        assert manifest.base is not None and manifest.base.fingerprint == default_base.info.fingerprint
        assert manifest.template and manifest.description
        assert {"origin", "licence", "digest"} <= manifest.lineage["data"].keys()
        assert manifest.lineage["recipe"] and manifest.lineage["seed"] == 0
        if manifest.lineage["recipe"].get("method") != "cartridge":  # its start is not told: it has rows of the data
            assert manifest.lineage["command"].startswith(f"softprompt train {name} ")
        assert {"soft_prompt", "floor"} <= manifest.metrics.keys() and manifest.metrics["rows"] >= 200
