"""The baselines that change the model: full fine-tuning and LoRA, on the same rows with the same loss."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from app.train.data import Example, batches
from app.train.forward import Batch

Kind = Literal["full", "lora"]
LORA_RANK = 8
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARMUP = 0.06  # of all steps
MAX_GRAD_NORM = 1.0


class OutOfTime(Exception):
    """The run did not end by its deadline."""


@dataclass(frozen=True)
class Tuned:
    """A tuned model at its best epoch, and how it got there."""

    model: Any
    validation_loss: float  # nats per answer token
    best_epoch: int  # 1, 2, ...; 0 is the untouched model
    losses: list[float]  # on the validation rows, after each epoch
    steps: int
    seconds: float
    trainable: int  # parameters


def finetune(
    model: PreTrainedModel,
    train: Sequence[Example],
    validation: Sequence[Example],
    *,
    kind: Kind,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    seed: int,
    patience: int,
    deadline: float = math.inf,
) -> Tuned:
    """AdamW, linear warm-up and decay, loss on the answers alone; the epoch with the least validation loss is kept.

    Ends before `epochs` once `patience` of them in turn were no better.

    LoRA (Hu et al. 2022, arXiv:2106.09685) of rank 8, alpha 16, on every linear layer. `model` is changed.
    Raises OutOfTime at `deadline` (time.monotonic()).
    """
    torch.manual_seed(seed)
    tuned: Any = model
    if kind == "lora":
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM, r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=LORA_MODULES
        )
        tuned = get_peft_model(model, config)
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    lengths = [len(example.ids) for example in train]
    total = epochs * math.ceil(len(train) / batch_size)
    warmup = max(1, round(WARMUP * total))
    # Where it begins may be the best there is: a rate that is too high must not hide that.
    best, best_epoch, losses, step = [p.detach().clone() for p in parameters], 0, [], 0
    least = _validate(model, validation, batch_size)
    began = time.monotonic()
    for epoch in range(epochs):
        model.train(False)  # no dropout, as soft prompts are trained
        for indices in batches(lengths, batch_size, seed, epoch):
            if time.monotonic() > deadline:
                raise OutOfTime
            rate = min((step + 1) / warmup, (total - step) / max(1, total - warmup))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate
            loss = _nll(model, Batch.of([train[i] for i in indices], device)).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            step += 1
        losses.append(_validate(model, validation, batch_size))
        if losses[-1] < least:
            least, best_epoch = losses[-1], epoch + 1
            best = [p.detach().clone() for p in parameters]
        if epoch + 1 - best_epoch >= patience:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    seconds = time.monotonic() - began
    return Tuned(model, least, best_epoch, losses, step, seconds, sum(p.numel() for p in parameters))


def _nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Of each answer token, in nats; only those places meet the vocabulary."""
    base: Any = model
    hidden = base.get_decoder()(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
    logits = base.get_output_embeddings()(hidden[batch.row, batch.column])
    return F.cross_entropy(logits.float(), batch.answer, reduction="none")


@torch.no_grad()
def _validate(model: PreTrainedModel, examples: Sequence[Example], batch_size: int) -> float:
    device = next(model.parameters()).device
    ordered = sorted(examples, key=lambda example: len(example.ids))
    found = [
        _nll(model, Batch.of(ordered[first : first + batch_size], device))
        for first in range(0, len(ordered), batch_size)
    ]
    return float(torch.cat(found).double().mean())


def few(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """A seeded sample for in-context examples."""
    return random.Random(f"few-shot {seed}").sample(list(rows), min(count, len(rows)))
