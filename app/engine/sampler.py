"""Chooses the next token of every row at once, and says how likely it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from app.engine import Logprob
from app.engine.distribution import crossing, ranked, total, tree, weights
from app.engine.logits import SamplingRow, is_plain, process
from app.engine.upload import upload
from app.errors import InvalidRequest, NumericalError

__all__ = ["Sampled", "SamplingRow", "sample", "target_logprobs", "token_logprobs"]

WIDTH = 256  # best tokens that a row with filters looks at first; few distributions need more to reach top_p
# Logits worked on at once, by device: what stays in the cache of a CPU, or fits the memory of a GPU as float64.
CHUNK_CPU, CHUNK_GPU = 2**20, 2**26


@dataclass(frozen=True)
class Sampled:
    id: int
    logprob: Logprob | None  # when params.logprobs is not None


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Sampled | Exception]:
    """The next token of each row of `logits` [rows, vocab_size], or why this row has none; `logits` stay as they are.

    NumericalError where a logit is NaN or plus infinity, or all are minus infinity, which is what a model may say of
    tokens it never gives; InvalidRequest where parameters and constraint together leave no token; EngineFailed where
    the constraint fails. Every row is computed from its own logits and parameters alone, bit by bit.

    A token is drawn by inverting the cumulative distribution in vocabulary order (see app.engine.distribution).
    """
    logits = _prepared(logits)
    vocab_size = logits.shape[-1]
    best, tokens = logits.max(dim=-1)  # NOTE: max propagates NaN, so it also finds the broken rows
    finite = torch.isfinite(best)

    errors: dict[int, Exception] = {}
    changed = [i for i, row in enumerate(rows) if not is_plain(row)]
    processed = logits
    if changed:
        index = _index(changed, logits.device)
        found, errors = process(logits[index], [rows[i] for i in changed])
        errors = {changed[i]: error for i, error in errors.items()}
        processed = logits.index_copy(0, index, found) if len(changed) < len(rows) else found
        best, tokens = best.clone(), tokens.clone()
        best[index], tokens[index] = found.max(dim=-1)
    for choose, has_filter in ((_draw, False), (_draw_filtered, True)):
        warm = [
            i for i, row in enumerate(rows) if row.params.temperature > 0 and _has_filter(row, vocab_size) == has_filter
        ]
        for some in _chunks(warm, logits):
            index = _index(some, logits.device)
            tokens[index] = choose(processed[index], best[index], [rows[i] for i in some])

    ids, is_finite, is_possible = torch.stack([tokens, finite.long(), (best > -torch.inf).long()]).tolist()
    logprobs = _sampled_logprobs(logits, tokens, rows)
    results: list[Sampled | Exception] = []
    for i in range(len(rows)):
        if not is_finite[i]:
            results.append(NumericalError("the model's logits are not finite"))
        elif i in errors:
            results.append(errors[i])
        elif not is_possible[i]:
            results.append(InvalidRequest("the request's constraint and parameters leave no token to choose"))
        else:
            results.append(Sampled(ids[i], logprobs.get(i)))
    return results


def token_logprobs(logits: torch.Tensor, targets: Sequence[int], num_top: int) -> list[Logprob]:
    """Log-probability of `targets[i]` under `logits[i]` ([tokens, vocab_size]), and of the `num_top` likeliest tokens.

    Raises NumericalError if logits are not finite.
    """
    found: list[Logprob] = []
    for some in _chunks(range(len(targets)), logits):
        chunk = _prepared(logits[some[0] : some[-1] + 1])
        ids = _index([targets[i] for i in some], chunk.device)
        found += _logprobs(chunk, ids, [num_top] * len(some))
    if any(item.logprob != item.logprob for item in found):
        raise NumericalError("the model's logits are not finite")
    return found


def target_logprobs(logits: torch.Tensor, positions: Sequence[int], targets: Sequence[int]) -> list[float]:
    """Log-probability of each target by the logits at its position, of which several may share one.

    NaN where those logits are not finite. However many there are: one pass over the positions, one copy to the host.
    """
    places = {position: place for place, position in enumerate(dict.fromkeys(positions))}
    bests, totals = [], []
    for some in _chunks(list(places), logits):
        chunk = _prepared(logits[_index(some, logits.device)])
        bests.append(chunk.amax(dim=-1))
        totals.append(_log_total(chunk, bests[-1]))
    index = upload(torch.tensor([positions, targets]), logits.device)
    values = _prepared(logits[index[0], index[1]])
    place = _index([places[position] for position in positions], values.device)
    found: list[float] = ((values - torch.cat(bests)[place]).double() - torch.cat(totals)[place]).tolist()
    return found


def _log_total(logits: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """float64 [rows]: what makes probabilities sum to 1, as logarithm, relative to the best logit."""
    return total(tree(weights(logits, best, torch.ones_like(best, dtype=torch.float64)))).log()


def _prepared(logits: torch.Tensor) -> torch.Tensor:
    """float32, and where float64 is to be had, which Apple's GPUs do not have."""
    logits = logits.detach().float().contiguous()
    return logits.cpu() if logits.device.type == "mps" else logits


def _sampled_logprobs(logits: torch.Tensor, tokens: torch.Tensor, rows: Sequence[SamplingRow]) -> dict[int, Logprob]:
    """By row, for those that ask. `logits` are the model's own."""
    counts = {i: row.params.logprobs for i, row in enumerate(rows) if row.params.logprobs is not None}
    found: dict[int, Logprob] = {}
    for some in _chunks(list(counts), logits):
        index = _index(some, logits.device)
        found |= zip(some, _logprobs(logits[index], tokens[index], [counts[i] for i in some]), strict=True)
    return found


def _chunks(rows: Sequence[int], logits: torch.Tensor) -> Iterator[Sequence[int]]:
    size = max(1, (CHUNK_CPU if logits.is_cpu else CHUNK_GPU) // logits.shape[-1])
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _logprobs(logits: torch.Tensor, ids: torch.Tensor, counts: Sequence[int]) -> list[Logprob]:
    """Of `ids` [rows], and of each row's `counts` likeliest tokens. NaN where logits are not finite."""
    best = logits.amax(dim=-1)
    log_total = _log_total(logits, best)
    width = min(max(counts), logits.shape[-1])
    columns = torch.cat([ids.unsqueeze(-1), ranked(logits, width)] if width else [ids.unsqueeze(-1)], dim=-1)
    values = (logits.gather(-1, columns) - best.unsqueeze(-1)).double() - log_total.unsqueeze(-1)
    # Ids in float64, where they are exact, so that everything crosses in one copy.
    columns_and_values = torch.stack([columns.double(), values]).tolist()
    found = []
    for count, row_ids, row_values in zip(counts, *columns_and_values, strict=True):
        top = zip(map(int, row_ids[1 : count + 1]), row_values[1 : count + 1], strict=True)
        found.append(Logprob(int(row_ids[0]), row_values[0], tuple(top)))
    return found


def _has_filter(row: SamplingRow, vocab_size: int) -> bool:
    return 0 < row.params.top_k < vocab_size or row.params.top_p < 1 or row.params.min_p > 0


def _index(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 [numbers]"""
    return upload(torch.tensor(numbers, dtype=torch.int64), device)


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """float64 [rows]"""
    return upload(torch.tensor(values, dtype=torch.float64), device)


def _draw(logits: torch.Tensor, best: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Token ids [rows] from the whole vocabulary."""
    temperature = _column([row.params.temperature for row in rows], logits.device)
    sums = tree(weights(logits, best, temperature))
    return crossing(sums, _column([row.draw for row in rows], logits.device) * total(sums), inclusive=False)


def _draw_filtered(logits: torch.Tensor, best: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Token ids [rows] from those within each row's top_k, top_p and min_p.

    Each filter keeps the first so many tokens of a stable descending sort, so the best few tokens are looked at, and
    more only for rows that they do not settle. How many were looked at does not show in the result.
    """
    device, vocab_size = logits.device, logits.shape[-1]
    temperature = _column([row.params.temperature for row in rows], device)
    top_k = [row.params.top_k if 0 < row.params.top_k < vocab_size else vocab_size for row in rows]
    # Probability mass, relative to the best token's, that top_p takes its share of: after top_k, else of everything.
    mass = torch.zeros_like(temperature)
    whole = [i for i, row in enumerate(rows) if row.params.top_p < 1 and top_k[i] == vocab_size]
    if whole:
        index = _index(whole, logits.device)
        mass[index] = total(tree(weights(logits[index], best[index], temperature[index])))
    largest = max((k for k in top_k if k < vocab_size), default=1)
    width = WIDTH if any(k == vocab_size for k in top_k) else 1
    while width < largest:
        width *= 2

    tokens = torch.zeros(len(rows), dtype=torch.int64, device=device)
    pending = list(range(len(rows)))
    while pending:
        index = _index(pending, logits.device)
        picked = logits if len(pending) == len(rows) else logits[index]
        chosen, settled = _draw_from_best(
            picked,
            best[index],
            temperature[index],
            mass[index],
            [rows[i] for i in pending],
            [top_k[i] for i in pending],
            min(width, vocab_size),
        )
        tokens[index] = chosen
        if width >= vocab_size or all(top_k[i] <= width for i in pending):
            break
        pending = [i for i, ok in zip(pending, settled.tolist(), strict=True) if not ok]
        width *= 16
    return tokens


def _draw_from_best(
    logits: torch.Tensor,
    best: torch.Tensor,
    temperature: torch.Tensor,
    mass: torch.Tensor,
    rows: Sequence[SamplingRow],
    top_k: Sequence[int],
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows], and whether the `width` best tokens hold all that the row's filters keep."""
    device = logits.device
    ids = ranked(logits, width)
    rank = torch.arange(width, device=device)
    limit = _index(top_k, logits.device)
    top_p = _column([row.params.top_p for row in rows], device)
    min_p = _column([row.params.min_p for row in rows], device)

    weight = weights(logits.gather(-1, ids), best, temperature)
    weight = weight.masked_fill(rank >= limit.unsqueeze(-1), 0)
    sums = tree(weight)
    mass = torch.where(limit < logits.shape[-1], total(sums), mass)
    last = crossing(sums, top_p * mass, inclusive=True)
    outside = (rank > last.unsqueeze(-1)) & (top_p < 1).unsqueeze(-1)
    outside |= weight < min_p.unsqueeze(-1)
    settled = (limit <= width) | ((top_p < 1) & (top_p * mass <= total(sums))) | (weight[:, -1] < min_p)

    # Back to vocabulary order, the kept tokens in front.
    weight = weight.masked_fill(outside, 0)
    ids, order = ids.masked_fill(weight == 0, logits.shape[-1]).sort(dim=-1)
    sums = tree(weight.gather(-1, order))
    hit = crossing(sums, _column([row.draw for row in rows], device) * total(sums), inclusive=False)
    return ids.gather(-1, hit.unsqueeze(-1)).squeeze(-1), settled
