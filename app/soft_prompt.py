"""The soft prompt as the engine sees it: virtual-token embeddings, or the keys and values themselves.

Embedding methods (Lester et al. 2021 and its relatives) give one vector per virtual token; KV methods
(prefix tuning, Li & Liang 2021; cartridges) give keys and values per layer. The engine turns both into the
same thing, a pinned prefix of the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

Kind = Literal["embedding", "kv"]


@dataclass(frozen=True)
class BaseInfo:
    """Identity and dimensions of the frozen base model: what a soft prompt must agree with."""

    name: str
    fingerprint: str  # "sha256:<hex>" over configuration, tokenizer and weights
    architecture: str  # transformers class, e.g. "LlamaForCausalLM"
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int  # positions, virtual tokens included
    embedding_norm: float | None = field(
        default=None, compare=False
    )  # median over a sample of the vocabulary, as the layers get it


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """An immutable soft prompt.

    `tensor` is float32 on the CPU: `[n, hidden_size]` for kind "embedding",
    `[num_layers, 2, num_kv_heads, n, head_dim]` (2 = keys, values) for kind "kv",
    where n is the number of virtual tokens. `digest` ("sha256:<hex>") identifies the content; the engine keys
    its prefixes by it, so equal names with different content can never share keys and values.
    """

    kind: Kind
    tensor: torch.Tensor = field(repr=False)
    digest: str

    @property
    def num_virtual_tokens(self) -> int:
        return int(self.tensor.shape[0] if self.kind == "embedding" else self.tensor.shape[3])

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()
