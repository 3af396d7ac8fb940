"""Answers of the engine on held-out rows, and how good they are: measured on what is served, not on the trainer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from app.answer import Answer
from app.engine import Engine, SamplingParams
from app.errors import Overloaded
from app.soft_prompt import SoftPrompt
from app.text import Template
from app.train.data import Row
from app.train.metrics import accuracy, constant, macro_f1, naive_bayes, rouge_l

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

    async def score(self, prompt: SoftPrompt | None, template: Template, rows: Sequence[Row]) -> dict[str, float]:
        """Scores of the answers behind `prompt` (None: the bare base model)."""
        return self.compare(await self.predict(prompt, template, rows), rows)

    async def predict(self, prompt: SoftPrompt | None, template: Template, rows: Sequence[Row]) -> list[str]:
        """One answer a row, in order. An engine that others keep busy is waited for."""
        room = asyncio.Semaphore(self.rows_in_flight)

        async def one(row: Row) -> str:
            async with room:
                while True:
                    try:
                        answer = await self._answer(prompt, template, row.input)
                        break
                    except Overloaded:
                        await asyncio.sleep(BUSY_SECONDS)
                self.on_row()
                return answer

        return await asyncio.gather(*map(one, rows))

    def compare(self, predictions: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
        """The scores of a list of answers."""
        targets = [row.target for row in rows]
        if self.labels is not None:
            scores = {"accuracy": accuracy(predictions, targets), "macro_f1": macro_f1(predictions, targets)}
        else:
            scores = {"exact_match": accuracy(predictions, targets), "rouge_l": rouge_l(predictions, targets)}
        return {name: round(value, 4) for name, value in scores.items()}

    def floors(self, train: Sequence[Row], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
        """Scores without a language model: the most frequent target, and naive Bayes or a copy of the input."""
        floors = {"constant": self.compare(constant([row.target for row in train], len(rows)), rows)}
        inputs = [row.input for row in rows]
        if self.labels is not None:
            answers = naive_bayes([(row.input, row.target) for row in train], inputs)
            floors["naive_bayes"] = self.compare(answers, rows)
        else:
            floors["copy"] = self.compare(inputs, rows)
        return floors

    async def zero_shot(self, instruction: str, template: Template, rows: Sequence[Row], seed: int) -> dict[str, Any]:
        """The base model, told what to do in words: plainly or through its chat template, whichever does better.

        The choice is made on a seeded sample of the rows, which favours this baseline; the scores are on all rows.
        """
        candidates = {"plain": Template(f"{instruction}\n\n{template.text or '{input}'}")}
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": f"{instruction}\n\n{{input}}"}]
            chat = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            candidates["chat"] = Template(str(chat))
        trial = random.Random(seed).sample(list(rows), min(ZERO_SHOT_TRIAL_ROWS, len(rows)))
        tried = {name: await self.score(None, form, trial) for name, form in candidates.items()}
        best = max(tried, key=lambda name: tuple(tried[name].values()))
        scores = await self.score(None, candidates[best], rows)
        return {**scores, "form": best, "instruction": instruction}

    def _answer(self, prompt: SoftPrompt | None, template: Template, text: str) -> Awaitable[str]:
        token_ids: list[int] = self.tokenizer(template.prompt(text))["input_ids"]
        if self.labels is not None:
            return self._classify(prompt, template, token_ids, self.labels)
        return self._generate(prompt, template, token_ids)

    async def _classify(
        self, prompt: SoftPrompt | None, template: Template, token_ids: list[int], labels: Sequence[str]
    ) -> str:
        continuations = [
            self.tokenizer(template.target(label), add_special_tokens=False)["input_ids"] for label in labels
        ]
        logprobs = [sum(found) for found in await self.engine.score(prompt, token_ids, continuations)]
        return labels[logprobs.index(max(logprobs))]

    async def _generate(self, prompt: SoftPrompt | None, template: Template, token_ids: list[int]) -> str:
        virtual = prompt.num_virtual_tokens if prompt is not None else 0
        room = self.engine.max_model_len - virtual - len(token_ids)
        most = max(1, min(self.max_tokens, room))
        params = SamplingParams(max_tokens=most, temperature=0.0, stop_token_ids=self.eos_token_ids)
        generation = self.engine.generate(prompt, token_ids, params)
        return (await Answer(generation, self.tokenizer, template, self.stop).text()).text
