"""Refuses at once what the engine would refuse later, its prompt read and its text tokenised for nothing."""

from __future__ import annotations

from collections.abc import Callable

from app.engine import Engine


class Door:
    """Counts the requests that are on their way to the engine. For one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._num_inside = 0

    def enter(self, digest: str | None) -> Callable[[], None]:
        """Keep a place behind that prompt until the result is called, once or more. Raises Overloaded, NotReady."""
        self._engine.check_room(digest, ahead=self._num_inside)
        self._num_inside += 1
        inside = True

        def leave() -> None:
            nonlocal inside
            self._num_inside -= inside
            inside = False

        return leave
