"""What `softprompt train` finds in its rows before it trains."""

from __future__ import annotations

import pytest

from app.errors import InvalidTrainingData
from app.text import Template
from app.train import Row
from app.train.job import Job, Splits
from app.train.recipe import Recipe
from tests.tiny import MAX_MODEL_LEN, tiny_base, tiny_tokenizer

VIRTUAL, LABEL = 4, "b" * 40


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_row_that_is_scored_has_room_for_every_label(split: str) -> None:
    """A row is scored with each label, its own or another, and its own with its end is counted too."""
    own, longest = (len(tiny_tokenizer()(text)["input_ids"]) for text in ("a", LABEL))
    most = MAX_MODEL_LEN - VIRTUAL - longest - own - 1

    def job(length: int) -> Job:
        text = next("q" * n for n in range(2000) if len(tiny_tokenizer()("q" * n + "\n")["input_ids"]) == length)
        rows = {"train": [Row("x", "a"), Row("y", LABEL)], "validation": [Row("z", "a")], "test": [Row("z", "a")]}
        splits = Splits(**{**rows, split: [Row(text, "a", "here")]})
        recipe = Recipe(num_virtual_tokens=VIRTUAL)
        return Job(task="mood", splits=splits, template=Template("{input}\n"), recipe=recipe, labels=["a", LABEL])

    base = tiny_base("llama")
    job(most).check(base)
    with pytest.raises(InvalidTrainingData, match=f"here: .* at most {MAX_MODEL_LEN - VIRTUAL - longest}"):
        job(most + 1).check(base)
