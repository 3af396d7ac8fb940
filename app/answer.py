"""From the tokens of a generation to the text of an answer, piece by piece."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from app.engine import FinishReason, Generation, Token
from app.errors import EngineFailed
from app.text import Detokenizer, StopStrings, Template


@dataclass(frozen=True)
class Piece:
    text: str
    finish_reason: FinishReason | None  # on the last piece, and only there


class Answer:
    """The answer to one input. Its pieces make the same text whoever reads them, a stream or a plain reply."""

    def __init__(self, generation: Generation, tokenizer: Any, template: Template, stop: Sequence[str]) -> None:
        self._generation = generation
        self._detokenizer = Detokenizer(tokenizer)
        self._template = template
        self._stops = StopStrings(stop)
        self._at_start = True
        self.num_tokens = 0  # generated so far; a stop token is not one of the answer's

    async def read(self, deliver: Callable[[Piece], Awaitable[None]]) -> None:
        """Deliver every piece. A stop string ends the generation at once."""
        try:
            async for token in self._generation:
                piece = self._push(token)
                if piece.text or piece.finish_reason:
                    await deliver(piece)
                if piece.finish_reason:
                    return
            raise EngineFailed("the generation ended without a reason")
        finally:
            await self.aclose()

    async def text(self) -> Piece:
        """The whole answer as one piece."""
        pieces: list[Piece] = []

        async def keep(piece: Piece) -> None:
            pieces.append(piece)

        await self.read(keep)
        return Piece("".join(piece.text for piece in pieces), pieces[-1].finish_reason)

    async def aclose(self) -> None:
        """End the generation if it has not ended. Idempotent."""
        await self._generation.aclose()

    def _push(self, token: Token) -> Piece:
        text = ""
        if token.id is not None:
            self.num_tokens += 1
            text = self._detokenizer.push([token.id])
        if token.finish_reason:
            text += self._detokenizer.flush()
        text = self._stops.push(self._strip(text))
        if self._stops.matched is not None:
            return Piece(text, "stop")
        if token.finish_reason:
            text += self._stops.flush()
        return Piece(text, token.finish_reason)

    def _strip(self, text: str) -> str:
        """Without the template's separator, which stands at the very start or nowhere."""
        if not self._at_start or not text:
            return text
        self._at_start = False
        return self._template.answer(text)
