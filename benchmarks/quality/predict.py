"""Answers of a model that transformers runs, in batches: for the baselines, which have no soft prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.text import Template

TOKENS_AT_ONCE = 16_384  # of a batch, padding included


def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    labels: Sequence[str],
    inputs: Sequence[str],
) -> list[str]:
    """The label with the largest summed log-likelihood behind each input, as /v1/classify scores them."""
    scores = label_scores(model, tokenizer, template, labels, inputs)
    return [labels[best] for best in scores.argmax(-1).tolist()]


@torch.inference_mode()
def label_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    labels: Sequence[str],
    inputs: Sequence[str],
) -> Tensor:
    """Summed log-likelihoods [inputs, labels] in nats, float64."""
    base: Any = model
    device = model.device
    prompts = tokenizer([template.prompt(text) for text in inputs])["input_ids"]
    targets = tokenizer([template.target(label) for label in labels], add_special_tokens=False)["input_ids"]
    tree = _Tree(targets)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    scores = torch.empty(len(inputs), len(labels), dtype=torch.float64)
    for chosen in _batches(order, [len(prompt) + len(tree.tokens) for prompt in prompts]):
        width = max(len(prompts[i]) for i in chosen)
        end = width + len(tree.tokens)
        padding = torch.tensor([width - len(prompts[i]) for i in chosen])
        ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] + tree.tokens for i in chosen])
        positions = torch.cat([torch.arange(width), width + tree.depths]) - padding[:, None]
        seen = torch.ones(end, end, dtype=torch.bool).tril()
        seen[width:, width:] = tree.seen
        # A padded place sees itself, so that no row of the softmax is empty; nothing else sees it.
        shown = torch.arange(end) >= padding[:, None]
        mask = (seen & shown[:, None, :] | torch.eye(end, dtype=torch.bool))[:, None]
        hidden = base.get_decoder()(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.clamp(min=0).to(device),
            use_cache=False,
        ).last_hidden_state[:, width - 1 :]
        for row, i in enumerate(chosen):  # a row of logits is the whole vocabulary
            logits = base.get_output_embeddings()(hidden[row]).float().log_softmax(-1)
            found = logits[tree.sources.to(device), tree.targets.to(device)].double().cpu()
            scores[i] = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, tree.owners, found)
    return scores


class _Tree:
    """Labels behind one prompt, all in one row: each sees the prompt and its own tokens alone.

    The last token of a label is scored and never read, so labels of one token add none.
    """

    def __init__(self, labels: Sequence[Sequence[int]]) -> None:
        self.tokens: list[int] = [token for label in labels for token in label[:-1]]
        owner = torch.tensor([i for i, label in enumerate(labels) for _ in label[:-1]], dtype=torch.int64)
        self.depths = torch.tensor([depth for label in labels for depth in range(len(label) - 1)], dtype=torch.int64)
        self.seen = (owner[:, None] == owner) & (self.depths[:, None] >= self.depths)  # [tokens, tokens]
        # For each token of each label: whose, which, and behind which place (0 is the prompt's last).
        self.owners = torch.tensor([i for i, label in enumerate(labels) for _ in label])
        self.targets = torch.tensor([token for label in labels for token in label])
        places, first = [], 1
        for label in labels:
            places += [0, *range(first, first + len(label) - 1)]
            first += len(label) - 1
        self.sources = torch.tensor(places)


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


def _batches(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """The indices, of ascending length, in batches of so many as fit."""
    found: list[list[int]] = [[]]
    for index in order:
        if (len(found[-1]) + 1) * lengths[index] > TOKENS_AT_ONCE:
            found.append([])
        found[-1].append(index)
    return found
