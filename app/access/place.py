"""One of the requests that a key may have at once."""

from __future__ import annotations

from collections.abc import Callable


class Place:
    """Given back once, however often and from wherever `leave` is called."""

    def __init__(self, on_leave: Callable[[], None]) -> None:
        self._on_leave: Callable[[], None] | None = on_leave

    def leave(self) -> None:
        on_leave, self._on_leave = self._on_leave, None
        if on_leave is not None:
            on_leave()
