"""Penalties, biases and masks: what is done to a row's logits before a token is chosen."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from app.engine import Constraint, SamplingParams
from app.engine.upload import upload
from app.errors import EngineFailed, SoftpromptError


@dataclass(frozen=True, eq=False)
class SamplingRow:
    """What the sampler has to know of one row of logits."""

    params: SamplingParams
    draw: float  # uniform in [0, 1); used when temperature > 0
    token_ids: Sequence[int]  # the prompt text, then the answer so far; virtual tokens are not text
    num_prompt_tokens: int
    constraint: Constraint | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> Sequence[int]:
        return self.token_ids[self.num_prompt_tokens :]


def is_plain(row: SamplingRow) -> bool:
    """Whether `process` would leave the row's logits as they are."""
    return row.constraint is None and not (
        _repeats(row) or _counts(row) or row.params.logit_bias or _too_short_to_stop(row)
    )


def process(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[torch.Tensor, dict[int, Exception]]:
    """Apply penalties, bias, `min_tokens` and constraint to `logits` [rows, vocab_size], in place, and return them.

    Also the errors of rows whose constraint failed, by row; their logits are of no use. Token ids outside the
    vocabulary have no effect.
    """
    _repetition_penalty(logits, rows)
    _presence_and_frequency_penalties(logits, rows)
    _add_bias(logits, rows)
    _forbid_stop_tokens(logits, rows)
    return logits, _apply_constraints(logits, rows)


def _repeats(row: SamplingRow) -> bool:
    return row.params.repetition_penalty != 1


def _counts(row: SamplingRow) -> bool:
    return bool(row.params.presence_penalty or row.params.frequency_penalty) and row.num_output_tokens > 0


def _too_short_to_stop(row: SamplingRow) -> bool:
    return row.num_output_tokens < row.params.min_tokens


class _Places:
    """Places [n] in a batch of logits, as row and token indices; gathers and writes them at once."""

    def __init__(self, logits: torch.Tensor, token_ids: Iterable[tuple[int, Iterable[int]]]) -> None:
        """`token_ids` are pairs of a row and its tokens."""
        flat, lengths, numbers = array("q"), [], []
        for number, tokens in token_ids:
            before = len(flat)
            flat.extend(tokens)
            numbers.append(number)
            lengths.append(len(flat) - before)
        self.row = torch.repeat_interleave(torch.tensor(numbers), torch.tensor(lengths))
        self.token = torch.tensor(flat, dtype=torch.int64)
        self._vocab_size = logits.shape[-1]
        valid = (self.token >= 0) & (self.token < self._vocab_size)
        self.row, self.token = self.row[valid], self.token[valid]

    def count(self) -> torch.Tensor:
        """Make the places unique; how often each was there, float32 [n]."""
        keys, counts = torch.unique(self.row * self._vocab_size + self.token, return_counts=True)
        self.row, self.token = keys // self._vocab_size, keys % self._vocab_size
        times: torch.Tensor = counts.float()
        return times

    def of(self, values: Sequence[float]) -> torch.Tensor:
        """[n]: each place's share of one value a row of the batch."""
        return torch.tensor(values, dtype=torch.float32)[self.row]

    def index(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return upload(self.row, device), upload(self.token, device)


def _repetition_penalty(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Keskar et al. 2019: towards "less likely" from either side of zero."""
    used = [(i, row) for i, row in enumerate(rows) if _repeats(row)]
    if not used:
        return
    places = _Places(logits, [(i, row.token_ids) for i, row in used])
    index = places.index(logits.device)
    penalty = upload(places.of([row.params.repetition_penalty for row in rows]), logits.device)
    found = logits[index]
    # A token that occurs twice is written twice, with the same value.
    logits[index] = torch.where(found > 0, found / penalty, found * penalty)


def _presence_and_frequency_penalties(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """OpenAI's: once for every token of the answer, and once for each time it occurs."""
    used = [(i, row.output_token_ids) for i, row in enumerate(rows) if _counts(row)]
    if not used:
        return
    places = _Places(logits, used)
    counts = places.count()
    presence = places.of([row.params.presence_penalty for row in rows])
    frequency = places.of([row.params.frequency_penalty for row in rows])
    index = places.index(logits.device)
    logits[index] = logits[index] - upload(presence + frequency * counts, logits.device)


def _add_bias(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    used = [(i, row.params.logit_bias) for i, row in enumerate(rows) if row.params.logit_bias]
    if not used:
        return
    known = [(i, _in_vocabulary(biases, logits)) for i, biases in used]
    places = _Places(logits, known)
    values = [biases[token] for (_, biases), (_, tokens) in zip(used, known, strict=True) for token in tokens]
    bias = torch.tensor(values, dtype=torch.float32)
    index = places.index(logits.device)
    logits[index] = logits[index] + upload(bias, logits.device)


def _in_vocabulary(token_ids: Iterable[int], logits: torch.Tensor) -> list[int]:
    """Of ids that a request names, which may be of any size."""
    return [token_id for token_id in token_ids if 0 <= token_id < logits.shape[-1]]


def _forbid_stop_tokens(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    stops = [(i, row.params.stop_token_ids) for i, row in enumerate(rows) if _too_short_to_stop(row)]
    if used := [(i, _in_vocabulary(tokens, logits)) for i, tokens in stops]:
        logits[_Places(logits, used).index(logits.device)] = -torch.inf


def _apply_constraints(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> dict[int, Exception]:
    """Minus infinity where a row's constraint does not allow the token; errors by row."""
    vocab_size = logits.shape[-1]
    masks: dict[int, torch.Tensor] = {}
    errors: dict[int, Exception] = {}
    for i, row in enumerate(rows):
        if row.constraint is None:
            continue
        try:
            mask = row.constraint.mask()
            if mask.dtype != torch.int32 or mask.shape != (-(-vocab_size // 32),):
                raise ValueError(f"a mask of {tuple(mask.shape)} {mask.dtype} for {vocab_size} tokens")
            masks[i] = mask
        except SoftpromptError as error:
            errors[i] = error
        except Exception as error:
            errors[i] = EngineFailed(f"the constraint failed: {error}")
            errors[i].__cause__ = error
    if masks:
        words = upload(torch.stack(list(masks.values())), logits.device)
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = ((words.unsqueeze(-1) >> bits) & 1).bool().flatten(1)[:, :vocab_size]
        index = upload(torch.tensor(list(masks)), logits.device)
        logits[index] = logits[index].masked_fill(~allowed, -torch.inf)
    return errors
