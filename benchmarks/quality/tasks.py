"""The tasks of the study: what is asked, how it is written, and how it is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.text import Template
from app.train.data import Row
from app.train.job import Splits


@dataclass(frozen=True)
class StudyTask:
    """`heading` stands before the answer, `instruction` is what a model that was not trained is told."""

    name: str
    classify: bool
    heading: str
    instruction: str
    max_tokens: int = 8

    @property
    def template(self) -> Template:
        return Template(f"{{input}}\n{self.heading}:")

    @property
    def score(self) -> str:
        """What decides."""
        return "accuracy" if self.classify else "exact_match"

    def splits(self, folder: Path) -> Splits:
        return Splits.read(folder / self.name)

    def few_shot(self, rows: Sequence[Row]) -> Template:
        """The instruction and solved examples before the input (in-context learning; Brown et al. 2020)."""
        shown = "\n\n".join(f"{row.input}\n{self.heading}: {row.target}" for row in rows)
        parts = (self.instruction, shown, f"{{input}}\n{self.heading}:")
        return Template("\n\n".join(part for part in parts if part))


TASKS = {
    task.name: task
    for task in (
        StudyTask(
            "sentiment_mixed",
            True,
            "Sentiment",
            "Decide whether the sentiment of the text is negative or positive. Answer negative or positive.",
        ),
        StudyTask(
            "clinc_domain",
            True,
            "Domain",
            "Which domain does the query belong to? Answer with one of: auto and commute, banking, credit cards, home, "
            "kitchen and dining, meta, out of scope, small talk, travel, utility, work.",
        ),
        StudyTask("banking77", True, "Intent", "What does the customer of the bank want? Name the intent."),
        StudyTask(
            "emotion_ekman",
            True,
            "Emotion",
            "Which emotion does the comment show? Answer anger, disgust, fear, joy, neutral, sadness or surprise.",
        ),
        StudyTask(
            "query_wellformed",
            True,
            "Form",
            "Is the question well-formed, without mistakes of spelling or grammar? Answer well-formed or malformed.",
        ),
        StudyTask(
            "snli",
            True,
            "Relation",
            "Does the hypothesis follow from the premise? Answer entailment, neutral or contradiction.",
        ),
        StudyTask(
            "ingredients",
            False,
            "Fields",
            "Parse the ingredient into quantity, unit, name and comment, separated by bars.",
            max_tokens=96,
        ),
        StudyTask(
            "address_parse",
            False,
            "Fields",
            "Parse the address into number, street, city, state and zip, separated by bars.",
            max_tokens=96,
        ),
        StudyTask(
            "restaurant_slots",
            False,
            "Slots",
            "Name the slots that the turn fills and their values, separated by bars, or none.",
            max_tokens=64,
        ),
        StudyTask(
            "disfl_qa",
            False,
            "Fluent question",
            "Rewrite the question without the hesitations and corrections, keeping only what was meant.",
            max_tokens=64,
        ),
    )
}
