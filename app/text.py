"""Text around the engine, which speaks token ids only: templates, incremental detokenisation, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import InvalidRequest

# A decoded token can end inside a UTF-8 character; tokenizers then show the replacement character.
REPLACEMENT = "�"


def without_bos(tokenizer: Any, text: str) -> str:
    """What a chat template has written, without the token that the tokenizer puts before every text by itself."""
    bos = tokenizer.bos_token
    if isinstance(bos, str) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return text.removeprefix(bos)
    return text


@dataclass(frozen=True)
class Template:
    """How an `input` becomes the text behind the virtual tokens, e.g. "{input}\\nSentiment:".

    A template that does not end in white space expects the answer after one space, as training wrote it
    (byte-level BPE keeps that space in the answer's first token); `answer` takes it off again.
    `Template(None)` is the identity: a checkpoint without a template gets the input as it is.
    """

    text: str | None = None

    def __post_init__(self) -> None:
        if self.text is not None and "{input}" not in self.text:
            raise InvalidRequest("a template must contain {input}", param="template")

    @property
    def _separator(self) -> str:
        return "" if self.text is None or self.text[-1:].isspace() else " "

    def prompt(self, text: str) -> str:
        # NOTE: not str.format, which would read attributes out of a hostile template.
        return text if self.text is None else self.text.replace("{input}", text)

    def target(self, answer: str) -> str:
        """The answer as the model should continue `prompt`."""
        return self._separator + answer

    def answer(self, completion: str) -> str:
        """The completion as a user wants to read it: without the separator."""
        return completion.removeprefix(self._separator)


class Detokenizer:
    """Turns a growing list of token ids into text pieces whose concatenation is the whole text.

    Decodes a short window (from the last safe boundary) instead of everything, so a step costs O(1), and
    holds back bytes that do not yet form a character.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._window_start = 0  # ids before it were emitted and serve no more as context
        self._emitted = 0  # ids before it have their text out

    def _decode(self, start: int, end: int | None = None) -> str:
        text: str = self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens and return the text that is now certain."""
        self._ids.extend(token_ids)
        return self._advance(final=False)

    def flush(self) -> str:
        """The held-back rest, broken characters included."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._window_start, self._emitted)
        now = self._decode(self._window_start)
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and not final):
            return ""
        self._window_start, self._emitted = self._emitted, len(self._ids)
        return now[len(before) :]


class StopStrings:
    """Ends streamed text at the stop string that is complete first, holding back what may be the start of one.

    The result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: the text ends behind the stop string instead of before it."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Return the text that certainly stands before any stop string; after a match, nothing more."""
        if self.matched is not None:
            return ""
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if found:
            position, self.matched = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            end = position + len(self.matched) if self._include else position
            out, self._held = self._held[:end], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that ends `text`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
