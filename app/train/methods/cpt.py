"""Context-aware prompt tuning (Blau et al. 2024, arXiv:2410.17222): a text and rows, each token moved a little.

The context's answers are never moved, the other tokens at most `cpt_epsilon` of a typical embedding's norm. The loss is
on the answer of the row alone; the paper's loss on the context's answers is left out.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import torch
from peft import CPTConfig, CPTEmbedding
from torch import Tensor

from app.errors import InvalidRecipe
from app.train.methods.method import Group, Method, Setup

# PEFT's types of a context's tokens, by their remainder mod 4, which it counts on from row to row
_FORMAT, _INPUT, _OUTPUT_FORMAT, _OUTPUT = 1, 2, 3, 4
_MOST_ROWS = 200  # that are tried for the context
_SEPARATOR = "\n\n"


class CPT(Method):
    limit: Tensor  # [n, 1]: the most that a token may move, L2; 0 for answers

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        recipe = setup.recipe
        if setup.initial is not None:
            raise InvalidRecipe("cpt starts from a text and training rows, not from a prompt", param="init")
        ids, types = _context(setup)
        dimensions = setup.dimensions()
        width = dimensions["token_dim"]
        most = recipe.cpt_epsilon * setup.rms * math.sqrt(width)
        epsilon = most / math.sqrt(width / 2048)  # PEFT's unit
        self.config = CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=ids,
            cpt_mask=[1] * len(ids),
            cpt_tokens_type_mask=types,
            opt_projection_epsilon=epsilon,
            opt_projection_format_epsilon=epsilon,
        )
        for name, value in dimensions.items():  # CPTConfig takes none of them
            setattr(self.config, name, value)
        words = setup.model.get_input_embeddings()
        self.encoder: Any = setup.seeded(
            lambda: CPTEmbedding(self.config, words)  # type: ignore[no-untyped-call]
        )
        self.rms = setup.rms
        limit = torch.tensor([0.0 if kind % 4 == 0 else most for kind in types], device=setup.device)
        self.register_buffer("limit", limit[:, None])

    def prompt(self) -> Tensor:
        """[n, hidden]"""
        tokens: Tensor = self.encoder.embedding.weight
        moved: Tensor = self.encoder.delta_embedding.weight
        return tokens + moved

    def groups(self) -> list[Group]:
        return [Group([self.encoder.delta_embedding.weight], self.rms)]

    @torch.no_grad()
    def constrain(self) -> None:
        moved = self.encoder.delta_embedding.weight
        norm = moved.norm(dim=1, keepdim=True)
        moved.mul_((self.limit / norm.clamp(min=1e-12)).clamp(max=1.0))


def _context(setup: Setup) -> tuple[list[int], list[int]]:
    """Token ids and their types: the text, then as many rows as fit, of each answer about as many."""
    recipe, template = setup.recipe, setup.template

    def encode(text: str) -> list[int]:
        found: list[int] = setup.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    room = recipe.num_virtual_tokens
    separator = encode(_SEPARATOR)
    ids = (encode(recipe.init_text) + separator)[:room] if recipe.init_text else []
    types = [_FORMAT] * len(ids)
    order = random.Random(f"context {recipe.seed}").sample(list(setup.rows), min(_MOST_ROWS, len(setup.rows)))
    seen: Counter[str] = Counter()
    ranked = []
    for row in order:
        ranked.append((seen[row.target], row))
        seen[row.target] += 1
    number = 0
    for _, row in sorted(ranked, key=lambda pair: pair[0]):
        parts = [
            (_INPUT, encode(template.prompt(row.input))),
            (_OUTPUT, encode(template.target(row.target))),
            (_OUTPUT_FORMAT, separator),
        ]
        if len(ids) + sum(len(part) for _, part in parts) > room:
            continue
        number += 1
        for kind, part in parts:
            ids += part
            types += [4 * number + kind] * len(part)
    if not ids:
        raise InvalidRecipe(
            f"no training row fits in {room} virtual tokens, and there is no init_text", param="num_virtual_tokens"
        )
    return ids, types
