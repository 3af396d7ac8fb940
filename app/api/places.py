"""Places for what may be under way a few times at once, and must not queue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from app.errors import Overloaded


class Places:
    """For one event loop."""

    def __init__(self, count: int, what: str) -> None:
        """`what` is under way, in the plural."""
        self._num_free = count
        self._what = what

    @contextmanager
    def one(self) -> Iterator[None]:
        """Raises Overloaded where none is free."""
        if self._num_free == 0:
            raise Overloaded(f"too many {self._what} are under way")
        self._num_free -= 1
        try:
            yield
        finally:
            self._num_free += 1
