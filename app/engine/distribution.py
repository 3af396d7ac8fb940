"""Arithmetic on rows of logits whose results do not depend on the rows beside them, down to the last bit.

Ready-made sums and scans choose their order of additions by the shape of the whole batch (on CUDA `cumsum` is not even
the same twice). Here sums are binary trees of elementwise additions, so that every row has one fixed order, and a tree
answers both questions of sampling by walking down: which token a draw hits, and how many tokens reach `top_p`.
"""

from __future__ import annotations

import torch

BLOCK = 64  # logits of which only the maximum is looked at first; 64 is the fastest of 16..256 at 49152 on the CPU


def weights(logits: torch.Tensor, best: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """exp((logit - best) / temperature): float64 [rows, tokens], 1 for the best token.

    Subtracting the maximum first, and float64, keep a tiny temperature from overflowing.
    """
    return (logits - best.unsqueeze(-1)).div(temperature.unsqueeze(-1)).exp_()


def tree(leaves: torch.Tensor) -> list[torch.Tensor]:
    """Sums of neighbours, level by level, from the [rows, tokens] leaves to the [rows, 1] total.

    Zeros behind the last leaf change no sum: a row cut to its first 2^k leaves has the same nodes above them.
    """
    levels = [leaves]
    while (width := levels[-1].shape[-1]) > 1:
        below = levels[-1]
        above = below.new_empty(below.shape[0], (width + 1) // 2)
        torch.add(below[:, 0 : width - 1 : 2], below[:, 1::2], out=above[:, : width // 2])
        if width % 2:
            above[:, -1] = below[:, -1]
        levels.append(above)
    return levels


def total(levels: list[torch.Tensor]) -> torch.Tensor:
    """[rows]"""
    return levels[-1][:, 0]


def crossing(levels: list[torch.Tensor], threshold: torch.Tensor, *, inclusive: bool) -> torch.Tensor:
    """Index [rows] of the first leaf whose cumulative sum exceeds the threshold (`inclusive`: or equals it).

    Always a leaf above zero, if the row has one, whatever rounding makes of the threshold.
    """
    index = torch.zeros(threshold.shape, dtype=torch.int64, device=threshold.device)
    for level in reversed(levels[:-1]):
        last = level.shape[-1] - 1
        left = level.gather(-1, (2 * index).unsqueeze(-1)).squeeze(-1)
        right = level.gather(-1, (2 * index + 1).clamp(max=last).unsqueeze(-1)).squeeze(-1)
        beyond = threshold > left if inclusive else threshold >= left
        beyond &= (right > 0) & (2 * index < last)
        threshold = torch.where(beyond, threshold - left, threshold)
        index = 2 * index + beyond
    return index


def ranked(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Ids [rows, count] of the best tokens, as a stable descending sort has them: equal ones in vocabulary order."""
    vocab_size = logits.shape[-1]
    if count >= vocab_size:
        return logits.sort(dim=-1, descending=True, stable=True).indices
    num_blocks = -(-vocab_size // BLOCK)
    if num_blocks <= count:
        return _top(logits, torch.arange(vocab_size, device=logits.device).expand_as(logits), count)
    # The best tokens stand in the blocks with the best maxima: of any other block every token is behind `count` maxima.
    padded = torch.nn.functional.pad(logits, (0, num_blocks * BLOCK - vocab_size), value=-torch.inf)
    blocks = padded.reshape(-1, num_blocks, BLOCK)
    best = blocks.amax(dim=-1)
    chosen = _top(best, torch.arange(num_blocks, device=logits.device).expand_as(best), count)
    ids = chosen.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=logits.device)
    found = blocks.gather(1, chosen.unsqueeze(-1).expand(-1, -1, BLOCK))
    return _top(found.flatten(1), ids.flatten(1), count)


def _top(logits: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
    """`topk`, which takes any of equal values, on keys that are never equal: the logit's bits, then the id."""
    bits = (logits + 0.0).view(torch.int32).long()  # + 0.0 because -0.0 is equal and has other bits
    ordered = bits ^ ((bits >> 63) & 0x7FFFFFFF)  # floats below zero count down
    keys = (ordered << 32) - ids
    return -keys.topk(count, dim=-1).values & 0xFFFFFFFF
