"""Chooses the next token of every row at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from app.engine import SamplingParams


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> list[int | None]:
    """One token id a row; None where the row's logits are not finite.

    `logits` is [rows, vocab_size]; `draws` holds one uniform number in [0, 1) a row, used by rows with a temperature.
    Every row is computed from its own logits, parameters and draw alone. Sampling is by inverting the cumulative
    distribution in vocabulary order, which needs one number a token and no sorted copy of the result.
    """
    logits = logits.float()
    best, greedy = logits.max(dim=-1)  # NOTE: max propagates NaN, so it also finds the broken rows
    tokens = greedy.clone()
    warm = [row for row, p in enumerate(params) if p.temperature > 0]
    if warm:
        index = torch.tensor(warm, device=logits.device)
        chosen = [params[row] for row in warm]
        probabilities = _probabilities(logits[index], chosen)
        cumulative = probabilities.cumsum(dim=-1)
        draw = torch.tensor([draws[row] for row in warm], dtype=cumulative.dtype, device=logits.device)
        # Of the row's own total, which rounding keeps a little off 1, and strictly below it, so the token exists.
        total = cumulative[:, -1]
        threshold = torch.minimum(draw * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens[index] = torch.searchsorted(cumulative, threshold.unsqueeze(-1), right=True).squeeze(-1)
    finite = torch.isfinite(best)
    return [
        token if ok else None for token, ok in zip(tokens.tolist(), finite.tolist(), strict=True)
    ]  # the step's one copy from the device


def _probabilities(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """[rows, vocab_size] float64, zero outside each row's top_k and top_p."""
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float64, device=logits.device)
    # Subtracting the maximum first, and float64, keep a tiny temperature from overflowing.
    scaled = (logits - logits.max(dim=-1, keepdim=True).values) / temperature.unsqueeze(-1)
    if any(p.top_k or p.top_p < 1 for p in params):
        scaled = _filter(scaled, params)
    return torch.softmax(scaled, dim=-1)


def _filter(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Minus infinity outside top_k, then outside the smallest set whose probability reaches top_p (Holtzman 2019)."""
    vocab_size = scaled.shape[-1]
    device = scaled.device
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab_size, device=device)
    top_k = torch.tensor([min(p.top_k or vocab_size, vocab_size) for p in params], device=device).unsqueeze(-1)
    ordered = ordered.masked_fill(rank >= top_k, -torch.inf)
    probabilities = torch.softmax(ordered, dim=-1)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device).unsqueeze(-1)
    # A token stays if the ones before it have not reached top_p yet; the first always stays.
    before = probabilities.cumsum(dim=-1) - probabilities
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1) & (rank > 0), -torch.inf)
    return torch.empty_like(scaled).scatter_(-1, order, ordered)
