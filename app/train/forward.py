"""The training loss: negative log-likelihood of the answers behind a soft prompt.

The soft prompt stands first and attention is causal, so its keys and values are the same for every row: embeddings are
run through the model once a step and shared, keys and values are trained as they are. Only answer positions meet the
vocabulary matrix.

A prompt is a tensor, its kind told by its rank: embeddings [n, hidden]; one prompt a task, [tasks, n, hidden], each row
behind that of its own; keys and values [layers, 2, KV heads, n, head_dim]. n is the number of virtual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from app.train.data import Example
from app.train.initial import embedding_weight
from app.train.memory import is_out_of_memory
from app.train.precision import mixed_precision

# nats; a wrong mask or position is off by far more, rounding by less: at most 0.36 and 0.05 with SmolLM2-135M in halves
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1.0, torch.float16: 0.15}
# of the greatest logit; both come from the same products of the same shape
_HEAD_TOLERANCE = 0.01
_TASKS, _KV = 3, 5  # ranks
# Keys of a row. Steps are 1.25 to 1.3 times as fast with 150 of them, 1.1 with 280 (SmolLM2-135M, AVX512). Each costs
# memory: up to here a token keeps no more than MICRO_BATCH_TOKENS counts with.
_PLAIN_ATTENTION = 256
# Padded tokens whose activations are kept at once, for their gradients. Measured on SmolLM2-135M in float32: 0.98 MB
# each, and 0.2 more for an answer (logits; twice as much again while their gradient is computed): 4 to 7 GB. By the
# same count of what is kept a token of an 8 B Llama in bfloat16 has 4.5 MB: 18 GB beside 16 of weights.
MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Batch:
    """Right-padded rows, and the places whose next token is part of an answer."""

    ids: Tensor  # [rows, length] int64, without each row's last token, behind which nothing is predicted
    mask: Tensor  # [rows, length] int64, 1 where there is a token
    row: Tensor  # [answer tokens] int64
    column: Tensor  # [answer tokens] int64, the position before the answer token
    answer: Tensor  # [answer tokens] int64
    task: Tensor  # [rows] int64

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device) -> Batch:
        """Pad with id 0, which the mask hides."""
        lengths = [len(example.ids) - 1 for example in examples]
        width = max(lengths)
        ids = [list(e.ids[:-1]) + [0] * (width - length) for e, length in zip(examples, lengths, strict=True)]
        mask = [[1] * length + [0] * (width - length) for length in lengths]
        places = [(i, j) for i, e in enumerate(examples) for j in range(e.start, len(e.ids))]
        return cls(
            ids=torch.tensor(ids, device=device),
            mask=torch.tensor(mask, device=device),
            row=torch.tensor([i for i, _ in places], device=device),
            column=torch.tensor([j - 1 for _, j in places], device=device),
            answer=torch.tensor([examples[i].ids[j] for i, j in places], device=device),
            task=torch.tensor([e.task for e in examples], device=device),
        )


def micro_batches(
    examples: Sequence[Example], *, before: int = 0, limit: int = MICRO_BATCH_TOKENS
) -> list[Sequence[Example]]:
    """The rows in their order, cut where one more would make more than `limit` padded tokens.

    `before` stands for the memory of the virtual tokens before each row. A row that is longer alone is a part alone.
    """
    parts, first, width = [], 0, 0
    for i, example in enumerate(examples):
        wider = max(width, before + len(example.ids))
        if i > first and wider * (i + 1 - first) > limit:
            parts.append(examples[first:i])
            first, wider = i, before + len(example.ids)
        width = wider
    return [*parts, examples[first:]]


def answer_nll(model: PreTrainedModel, prompt: Tensor, batch: Batch, *, shared: bool, is_mixed: bool = False) -> Tensor:
    """Negative log-likelihood in nats of each answer token -> [answer tokens] float32.

    `prompt` is as above. `shared` runs it once for all rows; without it the model's whole forward runs on every row,
    which is slower and right for any causal model. `is_mixed`: in mixed precision (app.train.precision).
    """
    prompt = prompt.to(embedding_weight(model).dtype)
    with mixed_precision(prompt.device, enabled=is_mixed), _attention(model, prompt, batch, is_mixed=is_mixed):
        logits = (_shared_logits if shared else _full_logits)(model, prompt, batch)
    return F.cross_entropy(logits.float(), batch.answer, reduction="none")


@contextmanager
def _attention(model: PreTrainedModel, prompt: Tensor, batch: Batch, *, is_mixed: bool) -> Iterator[None]:
    """Attention of short rows in mixed precision by two products, as torch's fused one is slow backwards there."""
    ours = model.config._attn_implementation
    keys = prompt.shape[-2] + batch.ids.shape[1]
    if not (is_mixed and ours == "sdpa" and keys <= _PLAIN_ATTENTION and model._can_set_attn_implementation()):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


def _shared_logits(model: PreTrainedModel, prompt: Tensor, batch: Batch) -> Tensor:
    base: Any = model
    hidden = base.get_decoder()(**_behind(_cache(model, prompt, batch), prompt, batch)).last_hidden_state
    logits: Tensor = base.get_output_embeddings()(hidden[batch.row, batch.column])  # hidden: [rows, length, hidden]
    return logits


def _full_logits(model: PreTrainedModel, prompt: Tensor, batch: Batch) -> Tensor:
    base: Any = model
    logits: Tensor = base(**_full_inputs(model, prompt, batch)).logits
    before = 0 if prompt.dim() == _KV else prompt.shape[-2]
    return logits[batch.row, batch.column + before]


def _full_inputs(model: PreTrainedModel, prompt: Tensor, batch: Batch) -> dict[str, Any]:
    """Arguments of one forward over every row whole, which may add to the cache among them."""
    if prompt.dim() == _KV:
        return _behind(_cache(model, prompt, batch), prompt, batch)
    text = model.get_input_embeddings()(batch.ids)
    prompts = prompt[batch.task] if prompt.dim() == _TASKS else prompt.expand(len(text), -1, -1)
    return {
        "inputs_embeds": torch.cat([prompts, text], dim=1),
        "attention_mask": _with_prompt(batch.mask, prompt.shape[-2]),
        "use_cache": False,
    }


def _cache(model: PreTrainedModel, prompt: Tensor, batch: Batch) -> DynamicCache:
    """The prompt's keys and values, for every row of the batch."""
    base: Any = model
    rows = len(batch.ids)
    cache = DynamicCache(config=model.config)
    if prompt.dim() == _KV:
        for layer, (keys, values) in enumerate(prompt):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache
    prompts = prompt if prompt.dim() == _TASKS else prompt.unsqueeze(0)
    base.get_decoder()(inputs_embeds=prompts, past_key_values=cache, use_cache=True)
    if prompt.dim() == _TASKS:
        cache.batch_select_indices(batch.task)
    else:
        cache.batch_repeat_interleave(rows)
    return cache


def _behind(cache: DynamicCache, prompt: Tensor, batch: Batch) -> dict[str, Any]:
    """Arguments of a forward over the text: its positions go on after the prompt's."""
    rows, length = batch.ids.shape
    n = prompt.shape[-2]
    return {
        "input_ids": batch.ids,
        "attention_mask": _with_prompt(batch.mask, n),
        "position_ids": torch.arange(n, n + length, device=batch.ids.device).expand(rows, -1),
        "past_key_values": cache,
        "use_cache": True,
    }


def _with_prompt(mask: Tensor, count: int) -> Tensor:
    return torch.cat([mask.new_ones(len(mask), count), mask], dim=1)


@torch.no_grad()
def can_share(model: PreTrainedModel, prompt: Tensor, examples: Sequence[Example]) -> bool:
    """Whether this model gives the same losses with the shared prompt as without.

    Measured on the shortest and the longest row, not read from a list of architectures: logit caps
    and scales show up in what the head alone makes of the decoder's states, recurrent layers and odd caches in the
    losses, which halves round differently. Out of memory says nothing of that and is passed on.
    """
    base: Any = model
    order = sorted(examples, key=lambda example: len(example.ids))
    batch = Batch.of([order[0], order[-1]], prompt.device)
    typed = prompt.to(embedding_weight(model).dtype)
    try:
        hidden = base.get_decoder()(**_full_inputs(model, typed, batch)).last_hidden_state
        logits, alone = base(**_full_inputs(model, typed, batch)).logits, base.get_output_embeddings()(hidden)
        ours = answer_nll(model, prompt, batch, shared=True)
    except Exception as error:  # whatever else a foreign architecture raises here, the full forward is right
        if is_out_of_memory(error):
            raise
        return False
    reference = answer_nll(model, prompt, batch, shared=False)
    if (logits - alone).abs().max() > _HEAD_TOLERANCE * logits.abs().max():
        return False
    return bool((ours - reference).abs().max() <= _TOLERANCE.get(typed.dtype, 0.0))
