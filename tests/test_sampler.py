from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from app.engine import SamplingParams
from app.engine.sampler import sample
from app.errors import InvalidRequest

VOCAB = 50


def draw(logits: torch.Tensor, count: int, **params: Any) -> list[int]:
    """Many draws of one row, in one call."""
    rng = random.Random(0)
    rows = logits.expand(count, -1)
    tokens = sample(rows, [SamplingParams(**params)] * count, [rng.random() for _ in range(count)])
    assert all(token is not None for token in tokens)
    return [token for token in tokens if token is not None]


def logits(seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def test_greedy_takes_the_largest_logit() -> None:
    rows = torch.stack([logits(i) for i in range(8)])
    assert sample(rows, [SamplingParams(temperature=0)] * 8, [0.9] * 8) == rows.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_softmax(temperature: float) -> None:
    count = 40_000
    found = torch.bincount(torch.tensor(draw(logits(), count, temperature=temperature)), minlength=VOCAB) / count
    expected = torch.softmax(logits() / temperature, -1)
    # 5 standard deviations of a binomial share, for every token
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


@pytest.mark.parametrize("top_k", [1, 3, 49])
def test_top_k_keeps_exactly_the_k_best(top_k: int) -> None:
    allowed = set(logits().topk(top_k).indices.tolist())
    assert set(draw(logits(), 20_000, temperature=5.0, top_k=top_k)) == allowed


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float) -> None:
    probabilities, order = torch.softmax(logits(), -1).sort(descending=True)
    size = int((probabilities.cumsum(-1) < top_p).sum()) + 1
    assert set(draw(logits(), 20_000, top_p=top_p)) <= set(order[:size].tolist())
    frequent = {int(i) for i, p in zip(order[:size], probabilities, strict=False) if p > 0.005}
    assert frequent <= set(draw(logits(), 20_000, top_p=top_p))


def test_top_k_comes_before_top_p() -> None:
    row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Within the two best the first has 0.57 of the mass, so p = 0.55 leaves it alone; over all four it has 0.4.
    assert set(draw(row, 2_000, top_k=2, top_p=0.55)) == {0}
    assert set(draw(row, 2_000, top_p=0.55)) == {0, 1}


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8, temperature=1.3),
        SamplingParams(top_k=7, top_p=0.5),
    ]
    rng = random.Random(1)
    rows = [(logits(i), rng.choice(kinds), rng.random()) for i in range(64)]
    together = sample(torch.stack([r[0] for r in rows]), [r[1] for r in rows], [r[2] for r in rows])
    alone = [sample(row[None], [params], [u])[0] for row, params, u in rows]
    assert together == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_row_is_reported_and_its_neighbours_are_not(temperature: float, poison: float) -> None:
    rows = torch.stack([logits(0), logits(1), logits(2)])
    rows[1, 17] = poison
    params = [SamplingParams(temperature=temperature)] * 3
    clean = sample(rows[[0, 2]], params[:2], [0.3, 0.6])
    assert sample(rows, params, [0.3, 0.5, 0.6]) == [clean[0], None, clean[1]]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-3, 100.0])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_extreme_temperatures_and_draws_give_a_token(temperature: float, u: float) -> None:
    (token,) = sample(logits()[None], [SamplingParams(temperature=temperature)], [u])
    assert token is not None and 0 <= token < VOCAB
    if temperature < 1e-2:
        assert token == logits().argmax()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 1e300),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("seed", 2**70),
    ],
)
def test_parameters_out_of_range_name_themselves(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
