"""Where a soft prompt begins: rows of the base's own embedding matrix, and the scale they have."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.errors import InvalidRecipe
from app.train.recipe import Recipe


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The base's input embeddings [vocabulary, hidden], on its device and in its dtype."""
    embeddings: Any = model.get_input_embeddings()
    weight: Tensor = embeddings.weight
    return weight


def embedding_rms(model: PreTrainedModel) -> float:
    """Root mean square of the embedding elements: the unit a recipe's learning rate is in."""
    weight = embedding_weight(model)
    return float(torch.linalg.vector_norm(weight, dtype=torch.float32)) / math.sqrt(weight.numel())


def initial_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Tensor:
    """The text's embeddings, repeated or cropped -> [virtual tokens, hidden] float32.

    Without a text, rows of the vocabulary drawn with the seed. Both are from Lester et al. 2021,
    section 3.2, where they beat random numbers; PEFT's own TEXT initialisation loads a tokenizer by
    name, perhaps from a hub. Raises InvalidRecipe when the text has no tokens.
    """
    weight = embedding_weight(model)
    if not recipe.init_text:
        generator = torch.Generator().manual_seed(recipe.seed)
        ids = torch.randint(len(weight), (recipe.num_virtual_tokens,), generator=generator)
        return weight[ids.to(weight.device)].float()
    text: list[int] = tokenizer(recipe.init_text, add_special_tokens=False)["input_ids"]
    if not text:
        raise InvalidRecipe("init_text has no tokens", param="init_text")
    repeated = [text[i % len(text)] for i in range(recipe.num_virtual_tokens)]
    return weight[torch.tensor(repeated, device=weight.device)].float()
