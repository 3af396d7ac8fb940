"""Every shipped prompt has a model card, and it says what its manifest says."""

from __future__ import annotations

import json

import pytest

from scripts.model_cards import cards, newest
from tests.shipped import PROMPTS, SHIPPED

CARDS = {path: text for path, text in cards(PROMPTS).items() if path.parent.name in SHIPPED}


def test_every_shipped_prompt_has_one() -> None:
    assert {path.parent.name for path in CARDS if path.is_file()} == set(SHIPPED)


@pytest.mark.parametrize("task", SHIPPED)
def test_card(task: str) -> None:
    path = PROMPTS / task / "README.md"
    assert path.read_text(encoding="utf-8") == CARDS[path], "write it again: python scripts/model_cards.py"
    manifest = json.loads((newest(PROMPTS / task) / "manifest.json").read_text(encoding="utf-8"))
    data = manifest["lineage"]["data"]
    text = CARDS[path]
    assert manifest["description"] and manifest["description"] in text
    assert data["licence"] in text and data["origin"] in text and data["cite"] in text
    score = "accuracy" if manifest["labels"] else "exact_match"
    assert f"| **this soft prompt** | {manifest['metrics']['soft_prompt'][score]:.3f} |" in text
    assert str(manifest["metrics"]["rows"]) in text
