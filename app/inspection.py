"""What a soft prompt looks like from outside: near words, norms, and which other prompts it resembles."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from app.soft_prompt import SoftPrompt

# What is compared at once: a large vocabulary's table in float32, or all of a long prompt's similarities to it, would
# be gigabytes.
VOCABULARY_PART = 2048
ROWS_PART = 512


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
    similarities, ids = _nearest(F.normalize(vectors, dim=1), embedding, neighbors)
    return [
        {
            "index": i,
            "norm": norm,
            "nearest": [
                {"id": token_id, "text": text_of(token_id), "similarity": round(value, 6)}
                for token_id, value in zip(near, values, strict=True)
            ],
        }
        for i, (norm, near, values) in enumerate(
            zip(vectors.norm(dim=1).tolist(), ids.tolist(), similarities.tolist(), strict=True)
        )
    ]


def _nearest(directions: torch.Tensor, embedding: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and ids of the `count` likest entries for each row of `directions`, the best first."""
    values = directions.new_empty(len(directions), 0)
    ids = torch.empty(values.shape, dtype=torch.long, device=values.device)
    for first in range(0, len(embedding), VOCABULARY_PART):
        part = F.normalize(embedding[first : first + VOCABULARY_PART].detach().float(), dim=1)
        found = [
            (directions[row : row + ROWS_PART] @ part.T).topk(min(count, len(part)), dim=1)
            for row in range(0, len(directions), ROWS_PART)
        ]
        values = torch.cat([values, torch.cat([best.values for best in found])], dim=1)
        ids = torch.cat([ids, torch.cat([best.indices for best in found]) + first], dim=1)
        values, order = values.topk(min(count, values.shape[1]), dim=1)
        ids = ids.gather(1, order)
    return values, ids


def median_norm(embedding: torch.Tensor) -> float:
    """Of the rows of the table: what a virtual token's norm is to be compared with."""
    return float(torch.linalg.vector_norm(embedding.detach(), dim=1, dtype=torch.float32).median())


@dataclass(frozen=True)
class Mean:
    """Of a prompt's virtual tokens, flat."""

    kind: str
    vector: torch.Tensor

    @classmethod
    def of(cls, prompt: SoftPrompt) -> Mean:
        return cls(prompt.kind, prompt.tensor.mean(dim=0 if prompt.kind == "embedding" else 3).flatten())


class Means:
    """Those used last, by digest, so that a comparison does not read every prompt anew. For one thread at a time."""

    def __init__(self, max_bytes: int = 64 * 2**20) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._means: OrderedDict[str, Mean] = OrderedDict()

    def get(self, digest: str, read: Callable[[], SoftPrompt]) -> Mean:
        """Raises what `read` raises."""
        known = self._means.get(digest)
        if known is not None:
            self._means.move_to_end(digest)
            return known
        mean = self._means[digest] = Mean.of(read())
        self._bytes += mean.vector.nbytes
        while self._bytes > self._max_bytes:
            _, dropped = self._means.popitem(last=False)
            self._bytes -= dropped.vector.nbytes
        return mean


def similar(mean: Mean, others: Iterable[tuple[str, Mean]], *, limit: int) -> list[dict[str, Any]]:
    """The `limit` most similar of the same kind, best first, by the cosine of the means over their virtual tokens.

    Tasks with similar prompts transfer to each other well (Vu et al. 2022, "SPoT", section 4).
    """
    found: list[dict[str, Any]] = [
        {"reference": name, "similarity": round(float(F.cosine_similarity(mean.vector, other.vector, dim=0)), 6)}
        for name, other in others
        if other.kind == mean.kind
    ]
    return sorted(found, key=lambda item: item["similarity"], reverse=True)[:limit]
