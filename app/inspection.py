"""What a soft prompt looks like from outside: near words, norms, and which other prompts it resembles."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from app.soft_prompt import SoftPrompt

VOCABULARY_PART = 8192


def virtual_tokens(
    prompt: SoftPrompt, embedding: torch.Tensor, text_of: Callable[[int], str], *, neighbors: int
) -> list[dict[str, Any]]:
    """One entry per virtual token, in order.

    `embedding` is the base model's table, [vocab, hidden], on any device and in any float type. An embedding prompt's
    tokens come with their `neighbors` likest entries of it, by cosine: what they mean, as far as words can tell
    (Lester et al. 2021, section 7). Keys and values come with norms only.
    """
    if prompt.kind == "kv":
        keys, values = prompt.tensor.square().sum(dim=(0, 2, 4)).sqrt()  # over layers, heads, head_dim
        return [
            {"index": i, "key_norm": float(key), "value_norm": float(value)}
            for i, (key, value) in enumerate(zip(keys, values, strict=True))
        ]
    vectors = prompt.tensor.to(embedding.device, torch.float32)
    directions = F.normalize(vectors, dim=1)
    # In parts: a large vocabulary's whole table in float32 would be gigabytes.
    parts = [
        directions @ F.normalize(embedding[first : first + VOCABULARY_PART].detach().float(), dim=1).T
        for first in range(0, len(embedding), VOCABULARY_PART)
    ]
    similarity = torch.cat(parts, dim=1)
    best = similarity.topk(min(neighbors, len(embedding)), dim=1)
    return [
        {
            "index": i,
            "norm": float(vector.norm()),
            "nearest": [
                {"id": token_id, "text": text_of(token_id), "similarity": round(value, 6)}
                for token_id, value in zip(ids, values, strict=True)
            ],
        }
        for i, (vector, ids, values) in enumerate(
            zip(vectors, best.indices.tolist(), best.values.tolist(), strict=True)
        )
    ]


def median_norm(embedding: torch.Tensor) -> float:
    """Of the rows of the table: what a virtual token's norm is to be compared with."""
    return float(torch.linalg.vector_norm(embedding.detach(), dim=1, dtype=torch.float32).median())


def similar(prompt: SoftPrompt, others: Iterable[tuple[str, SoftPrompt]], *, limit: int) -> list[dict[str, Any]]:
    """The `limit` most similar of the same kind, best first, by the cosine of the means over their virtual tokens.

    Tasks with similar prompts transfer to each other well (Vu et al. 2022, "SPoT", section 4).
    """
    mean = _mean(prompt)
    found: list[dict[str, Any]] = [
        {"reference": name, "similarity": round(float(F.cosine_similarity(mean, _mean(other), dim=0)), 6)}
        for name, other in others
        if other.kind == prompt.kind
    ]
    return sorted(found, key=lambda item: item["similarity"], reverse=True)[:limit]


def _mean(prompt: SoftPrompt) -> torch.Tensor:
    """Over the virtual tokens, flat."""
    return prompt.tensor.mean(dim=0 if prompt.kind == "embedding" else 3).flatten()
