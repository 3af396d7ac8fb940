"""From the tokens of a generation to the text of an answer, piece by piece."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from app.engine import FinishReason, Generation, Logprob, Token
from app.errors import EngineFailed
from app.text import Detokenizer, StopStrings, Template


@dataclass(frozen=True)
class Piece:
    text: str
    finish_reason: FinishReason | None  # on the last piece, and only there
    logprobs: tuple[Logprob, ...] = ()  # of the tokens since the last piece, where they were asked for
    token_ids: tuple[int, ...] = ()  # of the same tokens


class Answer:
    """The answer to one input. Its pieces make the same text whoever reads them, a stream or a plain reply."""

    def __init__(
        self,
        generation: Generation,
        tokenizer: Any,
        template: Template,
        stop: Sequence[str],
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
        report_stop_token: bool = False,
        skip_special_tokens: bool = True,
        on_token: Callable[[Token], None] = lambda _: None,
    ) -> None:
        """Stop strings are looked for in the text behind the first `min_tokens` tokens.

        `include_stop`: what ends the answer, string or token, is part of its text (of a token, if its log-probability
        is known: that has its id). `report_stop_token`: a stop token's log-probability is told with the others.
        `on_token` is told of every token as it comes.
        """
        self._generation = generation
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._template = template
        self._stops = StopStrings(stop, include=include_stop)
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._report_stop_token = report_stop_token
        self._on_token = on_token
        self._at_start = True
        self._logprobs: list[Logprob] = []  # of tokens whose text is held back
        self.has_begun = False  # the model has read the input
        self._token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0  # generated so far; a stop token is not one of the answer's
        self.num_cached_tokens = 0  # of the prompt text, known from the first token on
        self.prompt_logprobs: tuple[Logprob | None, ...] | None = None

    async def read(self, deliver: Callable[[Piece], Awaitable[None]]) -> None:
        """Deliver every piece. A stop string ends the generation at once."""
        try:
            async for token in self._generation:
                self._on_token(token)
                piece = self._push(token)
                if piece.text or piece.finish_reason:
                    self._logprobs.clear()
                    self._token_ids.clear()
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
        logprobs = tuple(logprob for piece in pieces for logprob in piece.logprobs)
        token_ids = tuple(token_id for piece in pieces for token_id in piece.token_ids)
        return Piece("".join(piece.text for piece in pieces), pieces[-1].finish_reason, logprobs, token_ids)

    async def aclose(self) -> None:
        """End the generation if it has not ended. Idempotent."""
        await self._generation.aclose()

    def _push(self, token: Token) -> Piece:
        text = ""
        self.has_begun = self.has_begun or token.finish_reason != "abort"
        self.num_cached_tokens += token.num_cached_tokens
        if token.prompt_logprobs is not None:
            self.prompt_logprobs = token.prompt_logprobs
        if token.id is not None:
            self.num_tokens += 1
            text = self._detokenizer.push([token.id])
            self._token_ids.append(token.id)
            if token.logprob is not None:
                self._logprobs.append(token.logprob)
        elif token.logprob is not None:  # a stop token
            if self._include_stop:
                text = self._detokenizer.push([token.logprob.id])
            if self._report_stop_token:
                self._logprobs.append(token.logprob)
        if token.finish_reason:
            text += self._detokenizer.flush()
        text = self._strip(text)
        if self.num_tokens > self._min_tokens:
            text = self._stops.push(text)
        if self._stops.matched is not None:
            return self._piece(text, "stop")
        if token.finish_reason:
            text += self._stops.flush()
        return self._piece(text, token.finish_reason)

    def _piece(self, text: str, finish_reason: FinishReason | None) -> Piece:
        self.finish_reason = finish_reason
        return Piece(text, finish_reason, tuple(self._logprobs), tuple(self._token_ids))

    def _strip(self, text: str) -> str:
        """Without the template's separator, which stands at the very start or nowhere."""
        if not self._at_start or not text:
            return text
        self._at_start = False
        return self._template.answer(text)
