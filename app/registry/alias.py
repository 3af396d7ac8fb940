"""Aliases: movable names, each for one version or, as a canary, for several by weight."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from app.errors import InvalidRequest
from app.registry.log import MAX_SPLIT

MAX_WEIGHT = 1e6
Weights = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Target:
    """What an alias stands for: pairs of version and share, ascending by version; the shares sum to 1."""

    weights: Weights

    @classmethod
    def of(cls, versions: int | Mapping[int, float]) -> Target:
        """One version, or versions with weights of any sum. Raises InvalidRequest for weights that say nothing."""
        if isinstance(versions, int):
            return cls(((versions, 1.0),))
        if not 1 <= len(versions) <= MAX_SPLIT:
            raise InvalidRequest(f"weights: there must be 1 to {MAX_SPLIT} versions", param="weights")
        if not all(0 < weight <= MAX_WEIGHT for weight in versions.values()):
            raise InvalidRequest(f"weights: each must be above 0 and at most {MAX_WEIGHT:.0f}", param="weights")
        total = math.fsum(versions.values())
        shares = tuple((number, weight / total) for number, weight in sorted(versions.items()))
        if not all(share for _, share in shares):
            raise InvalidRequest("weights: one is too small beside the others", param="weights")
        return cls(shares)

    @property
    def version(self) -> int:
        """The version with the largest share, of equals the oldest."""
        return max(self.weights, key=lambda pair: (pair[1], -pair[0]))[0]

    @property
    def numbers(self) -> frozenset[int]:
        return frozenset(number for number, _ in self.weights)

    @property
    def is_split(self) -> bool:
        return len(self.weights) > 1

    def at(self, point: float) -> int:
        """The version at a point of [0, 1), along which the shares lie in the order of their versions."""
        end = 0.0
        for number, share in self.weights:
            end += share
            if point < end:
                return number
        return self.weights[-1][0]  # the sum fell short of 1 by rounding


@dataclass(frozen=True)
class Alias:
    """A movable name; `etag` is the sequence number of the log entry that moved it last."""

    name: str
    target: Target
    etag: int
    previous: tuple[Target, ...] = field(default=(), compare=False, repr=False)  # what rolling back goes to, last first

    @property
    def version(self) -> int:
        return self.target.version

    def choose(self, task: str, user: str | None) -> int:
        """The version for one request. The same user gets the same one as long as the weights stay.

        A user's point on the line is the same for every split of this alias, so when the newer version's share grows
        users move to it and none moves back.
        """
        if not self.target.is_split:
            return self.version
        if user is None:
            return self.target.at(random.random())
        digest = hashlib.sha256(f"{task}@{self.name}\0{user}".encode()).digest()
        return self.target.at(int.from_bytes(digest[:7], "big") / 2**56)
