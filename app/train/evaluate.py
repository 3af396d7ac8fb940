"""Answers of the engine on held-out rows, and how good they are: measured on what is served, not on the trainer."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from app.answer import Answer
from app.engine import Engine, SamplingParams
from app.errors import Overloaded
from app.manifest import Calibration
from app.soft_prompt import SoftPrompt
from app.text import Template, without_bos
from app.train.data import Row
from app.train.evaluation import Evaluation
from app.train.floors import constant, naive_bayes

T = TypeVar("T")

ROWS_IN_FLIGHT = 64
BUSY_SECONDS = 0.5  # until an engine that has no room is asked again
ZERO_SHOT_TRIAL_ROWS = 100
DEFAULT_ANSWER_TOKENS = 128  # as in /v1/generate


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Everything but the rows. With `labels` a row is classified, else its answer is generated greedily."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    labels: Sequence[str] | None = None
    max_tokens: int = DEFAULT_ANSWER_TOKENS
    stop: Sequence[str] = ()
    rows_in_flight: int = ROWS_IN_FLIGHT
    on_row: Callable[[], None] = lambda: None  # called after every row

    async def evaluate(
        self,
        prompt: SoftPrompt | None,
        template: Template,
        rows: Sequence[Row],
        *,
        name: str = "",
        calibration: Calibration | None = None,
    ) -> Evaluation:
        """The answers behind `prompt` (None: the bare base model), which `name` is a name for.

        Calibration changes no answer, but probabilities.
        """
        if self.labels is None:
            answers = await self._each(rows, partial(self._generate, prompt, template))
            return Evaluation(name=name, rows=rows, answers=answers)
        scores = await self.label_scores(prompt, template, rows)
        return Evaluation(
            name=name,
            rows=rows,
            answers=_likeliest(self.labels, scores),
            labels=self.labels,
            label_scores=scores,
            temperature=None if calibration is None else calibration.temperature,
        )

    async def label_scores(
        self, prompt: SoftPrompt | None, template: Template, rows: Sequence[Row]
    ) -> list[list[float]]:
        """Log-likelihood of each label for each row, in order."""
        continuations: list[list[int]] = [
            self.tokenizer(template.target(label), add_special_tokens=False)["input_ids"] for label in self.labels or ()
        ]
        return await self._each(rows, partial(self._classify, prompt, template, continuations))

    async def _each(self, rows: Sequence[Row], answer: Callable[[str], Awaitable[T]]) -> list[T]:
        """One answer a row, in order. An engine that others keep busy is waited for."""
        room = asyncio.Semaphore(self.rows_in_flight)

        async def one(row: Row) -> T:
            async with room:
                while True:
                    try:
                        found = await answer(row.input)
                        break
                    except Overloaded:
                        await asyncio.sleep(BUSY_SECONDS)
                self.on_row()
                return found

        asked = [asyncio.create_task(one(row)) for row in rows]
        try:
            return await asyncio.gather(*asked)
        finally:  # where one fails or nobody waits any more, the others are not asked for nothing
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    def floors(self, train: Sequence[Row], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
        """Scores without a language model: the most frequent target, and naive Bayes or a copy of the input."""
        inputs = [row.input for row in rows]
        answers = {"constant": constant([row.target for row in train], len(rows))}
        if self.labels is not None:
            answers["naive_bayes"] = naive_bayes([(row.input, row.target) for row in train], inputs)
        else:
            answers["copy"] = inputs
        return {
            name: Evaluation(name=name, rows=rows, answers=found, labels=self.labels).scores
            for name, found in answers.items()
        }

    async def zero_shot(self, instruction: str, template: Template, rows: Sequence[Row], seed: int) -> dict[str, Any]:
        """The base model, told what to do in words: plainly or through its chat template, whichever does better.

        The choice is made on a seeded sample of the rows, which favours this baseline; the scores are on all rows.
        """
        candidates = {"plain": Template(f"{instruction}\n\n{template.text or '{input}'}")}
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": f"{instruction}\n\n{{input}}"}]
            chat = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            candidates["chat"] = Template(without_bos(self.tokenizer, str(chat)))
        trial = random.Random(seed).sample(list(rows), min(ZERO_SHOT_TRIAL_ROWS, len(rows)))
        tried = {name: (await self.evaluate(None, form, trial)).scores for name, form in candidates.items()}
        best = max(tried, key=lambda name: tuple(tried[name].values())[:2])  # what follows is none to choose by
        found = await self.evaluate(None, candidates[best], rows)
        return {**found.scores, "form": best, "instruction": instruction}

    async def _classify(
        self, prompt: SoftPrompt | None, template: Template, continuations: Sequence[Sequence[int]], text: str
    ) -> list[float]:
        found = await self.engine.score(prompt, self._encode(template, text), continuations)
        return [math.fsum(tokens) for tokens in found]

    async def _generate(self, prompt: SoftPrompt | None, template: Template, text: str) -> str:
        token_ids = self._encode(template, text)
        virtual = prompt.num_virtual_tokens if prompt is not None else 0
        most = max(1, min(self.max_tokens, self.engine.max_model_len - virtual - len(token_ids)))
        params = SamplingParams(max_tokens=most, temperature=0.0, stop_token_ids=self.eos_token_ids)
        generation = self.engine.generate(prompt, token_ids, params)
        return (await Answer(generation, self.tokenizer, template, self.stop).text()).text

    def _encode(self, template: Template, text: str) -> list[int]:
        token_ids: list[int] = self.tokenizer(template.prompt(text))["input_ids"]
        return token_ids


def _likeliest(labels: Sequence[str], scores: Sequence[Sequence[float]]) -> list[str]:
    """Of each row; of equal ones the first."""
    return [labels[row.index(max(row))] for row in scores]
