"""How far scores may be off by the choice of the rows: bootstrap intervals, seeded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TypeAlias

import numpy as np

from app.train.metrics import Counts, Scorer, value

Interval: TypeAlias = tuple[float, float]

RESAMPLES = 1_000
LEVEL = 0.95


def resample(rows: int, seed: int) -> Iterator[Counts]:
    """How often each row is drawn when `rows` are drawn with replacement; RESAMPLES times, the same for a seed."""
    generator = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        yield np.bincount(generator.integers(rows, size=rows), minlength=rows)


def intervals(
    scorers: Mapping[str, Scorer], rows: int, *, seed: int = 0, basic: Collection[str] = ()
) -> dict[str, Interval]:
    """The LEVEL interval of each, by percentiles (Efron & Tibshirani 1993, section 13.3), on the same resamples.

    Those in `basic` get the basic interval (Davison & Hinkley 1997, section 5.2), which mirrors the percentiles at the
    score: right where resampling moves a score one way, as it raises an expected calibration error.
    """
    drawn = np.array([[scorer(counts) for scorer in scorers.values()] for counts in resample(rows, seed)])
    tail = (1 - LEVEL) / 2
    found = {}
    for name, values in zip(scorers, drawn.T, strict=True):
        low, high = (float(bound) for bound in np.quantile(values, (tail, 1 - tail)))
        if name in basic:
            centre = value(scorers[name], rows)
            low, high = 2 * centre - high, 2 * centre - low
        found[name] = (low, high)
    return found


def difference(first: Scorer, second: Scorer) -> Scorer:
    """Of two versions' scores on the same rows, so that a resample takes a row for both: paired."""
    return lambda counts: first(counts) - second(counts)
