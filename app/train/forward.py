"""The training loss: negative log-likelihood of the answers behind one soft prompt.

The soft prompt stands first and attention is causal, so its keys and values are the same for every
row: they are computed once a step and shared, and only answer positions meet the vocabulary matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from app.train.data import Example
from app.train.initial import embedding_weight

# nats; a wrong mask, scale or logit cap is off by far more, rounding by less
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}


@dataclass(frozen=True)
class Batch:
    """Right-padded rows, and the places whose next token is part of an answer."""

    ids: Tensor  # [rows, length] int64
    mask: Tensor  # [rows, length] int64, 1 where there is a token
    row: Tensor  # [answer tokens] int64
    column: Tensor  # [answer tokens] int64, the position before the answer token
    answer: Tensor  # [answer tokens] int64

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device) -> Batch:
        """Pad with id 0, which the mask hides."""
        width = max(len(example.ids) for example in examples)
        ids = [list(e.ids) + [0] * (width - len(e.ids)) for e in examples]
        mask = [[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in examples]
        places = [(i, j) for i, e in enumerate(examples) for j in range(e.start, len(e.ids))]
        return cls(
            ids=torch.tensor(ids, device=device),
            mask=torch.tensor(mask, device=device),
            row=torch.tensor([i for i, _ in places], device=device),
            column=torch.tensor([j - 1 for _, j in places], device=device),
            answer=torch.tensor([examples[i].ids[j] for i, j in places], device=device),
        )


def answer_nll(model: PreTrainedModel, prompt: Tensor, batch: Batch, *, shared: bool) -> Tensor:
    """Negative log-likelihood in nats of each answer token -> [answer tokens] float32.

    `prompt` is [virtual tokens, hidden]. `shared` runs it once for all rows; without it the model's
    whole forward runs on every row, which is slower and right for any causal model.
    """
    prompt = prompt.to(embedding_weight(model).dtype)
    logits = (_shared_logits if shared else _full_logits)(model, prompt, batch)
    return F.cross_entropy(logits.float(), batch.answer, reduction="none")


def _shared_logits(model: PreTrainedModel, prompt: Tensor, batch: Batch) -> Tensor:
    base: Any = model
    decoder = base.get_decoder()
    rows, length = batch.ids.shape
    cache = DynamicCache(config=model.config)
    decoder(inputs_embeds=prompt.unsqueeze(0), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(rows)
    positions = torch.arange(len(prompt), len(prompt) + length, device=batch.ids.device)
    hidden = decoder(
        input_ids=batch.ids,
        attention_mask=_with_prompt(batch.mask, len(prompt)),
        position_ids=positions.expand(rows, -1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state  # [rows, length, hidden]
    logits: Tensor = base.get_output_embeddings()(hidden[batch.row, batch.column])
    return logits


def _full_logits(model: PreTrainedModel, prompt: Tensor, batch: Batch) -> Tensor:
    text = model.get_input_embeddings()(batch.ids)
    logits: Tensor = model(
        inputs_embeds=torch.cat([prompt.expand(len(text), -1, -1), text], dim=1),
        attention_mask=_with_prompt(batch.mask, len(prompt)),
        use_cache=False,
    ).logits
    return logits[batch.row, batch.column + len(prompt)]


def _with_prompt(mask: Tensor, count: int) -> Tensor:
    return torch.cat([mask.new_ones(len(mask), count), mask], dim=1)


@torch.no_grad()
def can_share(model: PreTrainedModel, prompt: Tensor, examples: Sequence[Example]) -> bool:
    """Whether this model gives the same losses with the shared prompt as without.

    Measured on the shortest and the longest row, not read from a list of architectures: logit caps
    and scales, recurrent layers and odd caches all show up here.
    """
    order = sorted(examples, key=lambda example: len(example.ids))
    batch = Batch.of([order[0], order[-1]], prompt.device)
    try:
        ours = answer_nll(model, prompt, batch, shared=True)
    except Exception:  # whatever a foreign architecture raises here, the full forward is right
        return False
    reference = answer_nll(model, prompt, batch, shared=False)
    tolerance = _TOLERANCE.get(embedding_weight(model).dtype, 0.0)
    return bool((ours - reference).abs().max() <= tolerance)
