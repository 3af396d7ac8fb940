"""What a sequence keeps of itself, without a model."""

from __future__ import annotations

import random

from app.engine import SamplingParams
from app.engine.sequence import GenerationSequence


def drawn(seed: int | None, count: int) -> list[float]:
    sequence = GenerationSequence([1], params=SamplingParams(seed=seed))
    draws = []
    for _ in range(count):
        draws.append(sequence.draw)
        assert sequence.draw == draws[-1], "a step that is tried again draws the same number"
        sequence.append(5, None)
    return draws


def test_every_token_has_a_draw_of_its_own() -> None:
    draws = drawn(3, 50)
    assert draws == drawn(3, 50) and len(set(draws)) == 50
    expected = random.Random("3")
    assert draws == [expected.random() for _ in range(50)]
    assert draws != drawn(-3, 50)
    assert drawn(None, 10) != drawn(None, 10)
