"""Answers of a model that transformers runs, in batches: for the baselines, which have no soft prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.text import Template

TOKENS_AT_ONCE = 16_384  # of a batch, padding included


@torch.inference_mode()
def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    labels: Sequence[str],
    inputs: Sequence[str],
) -> list[str]:
    """The label with the largest summed log-likelihood behind each input, as /v1/classify scores them."""
    base: Any = model
    device = model.device
    prompts = tokenizer([template.prompt(text) for text in inputs])["input_ids"]
    targets = tokenizer([template.target(label) for label in labels], add_special_tokens=False)["input_ids"]
    pairs = [(i, j, [*prompt, *target]) for i, prompt in enumerate(prompts) for j, target in enumerate(targets)]
    pairs.sort(key=lambda pair: len(pair[2]))
    scores = torch.full((len(inputs), len(labels)), -torch.inf, dtype=torch.float64)
    for batch in _batches(pairs):
        width = len(batch[-1][2])
        ids = torch.tensor([ids + [0] * (width - len(ids)) for _, _, ids in batch], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for _, _, ids in batch], device=device)
        hidden = base.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        places = [
            (row, column, token)
            for row, (i, j, _) in enumerate(batch)
            for column, token in enumerate(targets[j], start=len(prompts[i]) - 1)
        ]
        rows, columns, tokens = (torch.tensor(list(part), device=device) for part in zip(*places, strict=True))
        found = torch.empty(len(places), dtype=torch.float64)
        for first in range(0, len(places), TOKENS_AT_ONCE // 4):  # a row of logits is the whole vocabulary
            part = slice(first, first + TOKENS_AT_ONCE // 4)
            logits = base.get_output_embeddings()(hidden[rows[part], columns[part]]).float()
            found[part] = -F.cross_entropy(logits, tokens[part], reduction="none").double().cpu()
        sums = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, rows.cpu(), found)
        for (i, j, _), score in zip(batch, sums.tolist(), strict=True):
            scores[i, j] = score
    return [labels[best] for best in scores.argmax(-1).tolist()]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    inputs: Sequence[str],
    *,
    max_tokens: int,
) -> list[str]:
    """Greedy answers up to the end of the first line, as the shipped prompts stop."""
    prompts = tokenizer([template.prompt(text) for text in inputs])["input_ids"]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    end = tokenizer.eos_token_id
    answers = [""] * len(inputs)
    first = 0
    while first < len(order):
        # The longest comes last: so many rows that all keys and values have room.
        count = max(1, 2 * TOKENS_AT_ONCE // (len(prompts[order[first]]) + max_tokens))
        chosen = order[first : first + count]
        width = len(prompts[chosen[-1]])
        first += len(chosen)
        ids = torch.tensor([[end] * (width - len(prompts[i])) + prompts[i] for i in chosen], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
        runs: Any = model
        found = runs.generate(
            input_ids=ids,
            attention_mask=mask.to(model.device),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=[end, *_line_ends(tokenizer)],
            pad_token_id=end,
        )[:, width:]
        for i, answer in zip(chosen, found.tolist(), strict=True):
            text = str(tokenizer.decode(answer, skip_special_tokens=True))
            answers[i] = text.split("\n")[0].strip()
    return answers


def _line_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token of a line's end alone; a line's end inside another token is cut off afterwards."""
    ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return list(ids) if len(ids) == 1 else []


def _batches(pairs: Sequence[tuple[int, int, list[int]]]) -> list[list[tuple[int, int, list[int]]]]:
    """Of ascending length, each of so many rows as fit."""
    found: list[list[tuple[int, int, list[int]]]] = [[]]
    for pair in pairs:
        if (len(found[-1]) + 1) * len(pair[2]) > TOKENS_AT_ONCE:
            found.append([])
        found[-1].append(pair)
    return found
