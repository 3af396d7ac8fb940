"""What can be had without any language model: the floors that a soft prompt must be above."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from app.train.metrics import words


def constant(train_targets: Sequence[str], count: int) -> list[str]:
    """The most frequent training target, for every row: the majority class, or the best constant answer."""
    return [Counter(train_targets).most_common(1)[0][0]] * count


def naive_bayes(train: Sequence[tuple[str, str]], inputs: Sequence[str]) -> list[str]:
    """Multinomial naive Bayes over lower-cased words with Laplace smoothing (Manning et al. 2008, 13.2).

    `train` holds (input, label) pairs.
    """
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for text, label in train:
        seen[label].update(words(text))
    priors = Counter(label for _, label in train)
    vocabulary = set[str]().union(*seen.values())
    totals = {label: sum(counts.values()) + len(vocabulary) for label, counts in seen.items()}

    def predict(text: str) -> str:
        known = [word for word in words(text) if word in vocabulary]
        return max(
            priors,
            key=lambda label: (
                math.log(priors[label] / len(train))
                + sum(math.log((seen[label][word] + 1) / totals[label]) for word in known)
            ),
        )

    return [predict(text) for text in inputs]
