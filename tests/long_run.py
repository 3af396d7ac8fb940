"""How long the runs marked `long` are: HOSTILE_SEED, HOSTILE_COUNT and HOSTILE_SECONDS say so."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

SEED = int(os.environ.get("HOSTILE_SEED", "1"))
SECONDS = float(os.environ.get("HOSTILE_SECONDS", "inf"))


def long_count(default: int) -> int:
    return int(os.environ.get("HOSTILE_COUNT", default))


def indices(count: int, seconds: float = float("inf")) -> Iterator[int]:
    """The first `count`, or those that fit into the time."""
    end = time.monotonic() + seconds
    for index in range(count):
        if time.monotonic() > end:
            return
        yield index


def report(text: str) -> None:
    """Past pytest's capture."""
    os.write(1, f"\n{text}\n".encode())
