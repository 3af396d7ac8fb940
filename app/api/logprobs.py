"""Log-probabilities as replies have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from app.api.json_text import JsonText
from app.engine import Logprob

MIN_LOGPROB = -9999.0  # JSON has no minus infinity; this is what OpenAI writes for it


class TokenTexts(dict[int, str]):
    """Each token by itself, which need not be whole characters, as a JSON string; decoded once.

    Threads may share it.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str:
        text = json.dumps(self._tokenizer.decode([token_id]))
        self[token_id] = text
        return text


def num_entries(logprobs: Sequence[Logprob | None]) -> int:
    """How many `logprob_entries` makes, without looking at each."""
    last = logprobs[-1] if logprobs else None
    return len(logprobs) * (1 + len(last.top if last else ()))


def logprob_entries(texts: TokenTexts, logprobs: Sequence[Logprob | None]) -> JsonText:
    """Tokens as text, id and log-probability. Of many it takes longer than an event loop can spare.

    NOTE: Written out, because a million dicts stop every thread while the garbage collector, and then `json`, go
    through them.
    """

    def entry(token_id: int, logprob: float) -> str:
        value = logprob if logprob > MIN_LOGPROB else MIN_LOGPROB
        return f'"token":{texts[token_id]},"id":{token_id},"logprob":{value!r}'

    def entries(found: Logprob) -> str:
        top = ",".join([f"{{{entry(token_id, logprob)}}}" for token_id, logprob in found.top])
        return f'{{{entry(found.id, found.logprob)},"top_logprobs":[{top}]}}'

    return JsonText(f"[{','.join([entries(found) if found else 'null' for found in logprobs])}]")
