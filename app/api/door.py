"""Refuses at once what the engine would refuse later, when its text had been templated and tokenised for nothing."""

from __future__ import annotations

from collections.abc import Callable

from app.engine import Engine
from app.soft_prompt import SoftPrompt


class Door:
    """Counts the requests that are on their way to the engine. For one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._num_inside = 0

    def enter(self, prompt: SoftPrompt | None) -> Callable[[], None]:
        """Keep a place until the result is called, more than once if you like. Raises Overloaded, NotReady."""
        self._engine.check_room(prompt, ahead=self._num_inside)
        self._num_inside += 1
        inside = True

        def leave() -> None:
            nonlocal inside
            self._num_inside -= inside
            inside = False

        return leave
