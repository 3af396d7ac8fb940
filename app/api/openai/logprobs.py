"""Log-probabilities as OpenAI writes them. Written out as JSON text, for the reason that `app.api.logprobs` gives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from app.api.json_text import JsonText
from app.api.logprobs import MIN_LOGPROB, TokenTexts
from app.engine import Logprob
from app.text import REPLACEMENT, Detokenizer


class Entry(NamedTuple):
    """One token of a completion, each member as JSON."""

    token: str
    logprob: str
    top: str
    offset: str


class CompletionLogprobs:
    """Those of one choice, piece by piece.

    An offset is the number of characters in the choice's text before the token; tokens that are parts of one
    character share its offset.
    """

    def __init__(self, texts: TokenTexts, tokenizer: Any, *, skip_special_tokens: bool) -> None:
        self._texts = texts
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._begin(0)

    def of_prompt(self, text: str, token_ids: Sequence[int], logprobs: Sequence[Logprob | None]) -> list[Entry]:
        """Of the prompt that an echo puts before the answer: to be called first, and once."""
        found = [self._entry(token_id, logprob) for token_id, logprob in zip(token_ids, logprobs, strict=True)]
        self._begin(len(text))
        return found

    def of_answer(self, logprobs: Iterable[Logprob]) -> list[Entry]:
        return [self._entry(logprob.id, logprob) for logprob in logprobs]

    def _begin(self, offset: int) -> None:
        self._offset = offset
        self._detokenizer = Detokenizer(self._tokenizer, skip_special_tokens=self._skip_special_tokens)

    def _entry(self, token_id: int, found: Logprob | None) -> Entry:
        offset = self._offset
        self._offset += len(self._detokenizer.push([token_id]))
        token = self._texts[token_id]
        if found is None:
            return Entry(token, "null", "null", str(offset))
        top: dict[str, float] = {}
        for other, logprob in (*found.top, (token_id, found.logprob)):
            # Parts of characters look alike; the likeliest stands for them.
            top.setdefault(self._texts[other], logprob)
        pairs = ",".join([f"{text}:{_number(logprob)}" for text, logprob in top.items()])
        return Entry(token, _number(found.logprob), f"{{{pairs}}}", str(offset))


def completion_logprobs(entries: Sequence[Entry]) -> JsonText:
    """The member `logprobs` of a choice."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    lists = zip(*entries, strict=True) if entries else ((),) * len(names)
    parts = [f'"{name}":[{",".join(values)}]' for name, values in zip(names, lists, strict=True)]
    return JsonText(f"{{{','.join(parts)}}}")


def chat_logprobs(texts: TokenTexts, logprobs: Iterable[Logprob]) -> JsonText:
    """The same of a chat's choice."""

    def entry(token_id: int, logprob: float) -> str:
        token = texts[token_id]
        text: str = json.loads(token)
        # A part of a character is shown by the replacement character, the bytes of which are not the token's.
        shown = "null" if REPLACEMENT in text else f"[{','.join(map(str, text.encode()))}]"
        return f'"token":{token},"logprob":{_number(logprob)},"bytes":{shown}'

    def entries(found: Logprob) -> str:
        top = ",".join([f"{{{entry(token_id, logprob)}}}" for token_id, logprob in found.top])
        return f'{{{entry(found.id, found.logprob)},"top_logprobs":[{top}]}}'

    return JsonText(f'{{"content":[{",".join([entries(found) for found in logprobs])}],"refusal":null}}')


def _number(logprob: float) -> str:
    return repr(max(float(logprob), MIN_LOGPROB))
