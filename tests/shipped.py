"""The prompts that ship: `prompts/` is also the default registry, so a user's own tasks may stand beside them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ROOT / "prompts"
SHIPPED = (
    "address_parse",
    "banking77",
    "clinc_domain",
    "disfl_qa",
    "emotion_ekman",
    "query_wellformed",
    "restaurant_slots",
    "sentiment_mixed",
)
