"""Where a soft prompt begins: rows of the base's own embedding matrix, and the scale they have."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from app.errors import InvalidRecipe
from app.train.recipe import Recipe


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The base's input embeddings [vocabulary, hidden], on its device and in its dtype."""
    embeddings: Any = model.get_input_embeddings()
    weight: Tensor = embeddings.weight
    return weight


@torch.no_grad()
def embedding_rms(model: PreTrainedModel) -> float:
    """Root mean square of the embedding elements, as the layers get them: the unit a recipe's learning rate is in."""
    weight = embedding_weight(model)
    rms = float(torch.linalg.vector_norm(weight, dtype=torch.float32)) / math.sqrt(weight.numel())
    # Some bases scale what they look up, Gemma by the root of its width.
    ids = list(range(min(64, len(weight))))
    plain, looked_up = weight[: len(ids)].float().norm(), embed(model, ids).norm()
    return rms * float(looked_up / plain) if plain else rms


@torch.no_grad()
def embed(model: PreTrainedModel, ids: Sequence[int] | Tensor) -> Tensor:
    """The tokens' embeddings, as the layers get them -> [len(ids), hidden] float32."""
    where = torch.as_tensor(ids, device=embedding_weight(model).device)
    found: Tensor = model.get_input_embeddings()(where)
    return found.float()


def initial_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, targets: Sequence[str] = ()
) -> Tensor:
    """Embeddings to begin with, by `recipe.start` -> [virtual tokens, hidden] float32.

    "text": those of the text's tokens, repeated or cropped. "vocabulary": random rows, drawn with the seed. "labels":
    for each distinct target, the most frequent first, the mean of its tokens' embeddings; random rows after the last.
    All three are from Lester et al. 2021, section 3.2, where they beat random numbers; PEFT's own TEXT initialisation
    loads a tokenizer by name, perhaps from a hub. Raises InvalidRecipe where there is nothing to begin with.
    """
    count = recipe.num_virtual_tokens
    if recipe.start == "prompt":
        raise InvalidRecipe('init "prompt" needs a prompt to start from', param="init")
    if recipe.start == "text":
        text = text_ids(tokenizer, recipe.init_text)
        return embed(model, [text[i % len(text)] for i in range(count)])
    generator = torch.Generator().manual_seed(recipe.seed)
    start = embed(model, torch.randint(len(embedding_weight(model)), (count,), generator=generator))
    if recipe.start == "labels":
        labels = [label for label, _ in Counter(targets).most_common(count)]
        if not labels:
            raise InvalidRecipe('init "labels" needs targets', param="init")
        for number, label in enumerate(labels):
            start[number] = embed(model, text_ids(tokenizer, label)).mean(dim=0)
    return start


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, at least one. Raises InvalidRecipe."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InvalidRecipe("init_text has no tokens", param="init_text")
    return ids


@torch.no_grad()
def keys_and_values(model: PreTrainedModel, embeddings: Tensor) -> Tensor:
    """What the frozen base computes for `embeddings` [n, hidden] -> [layers, 2, KV heads, n, head_dim] float32.

    Positions count from 0 and keys have their rotation, as in a KV cache. Raises InvalidRecipe for a base whose
    layers do not all keep the same shape of keys and values for every position.
    """
    base: Any = model
    cache: Any = DynamicCache(config=model.config)
    inputs = embeddings.to(embedding_weight(model).dtype).unsqueeze(0)
    base.get_decoder()(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
    try:
        found = torch.stack([torch.cat([layer.keys, layer.values]) for layer in cache.layers])
        fits = found.dim() == 5 and found.shape[-2] == len(embeddings)
    except (AttributeError, TypeError, RuntimeError):
        fits = False
    if not fits:
        raise InvalidRecipe(
            "the base's layers keep keys and values of different shapes, or not of all virtual tokens: "
            "only methods that train embeddings suit it",
            param="method",
        )
    return found.float()
