"""From the fields of a request to what the engine samples by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import anyio.to_thread

from app.api.deps import State
from app.api.schemas import MAX_LOGPROB_ENTRIES, MAX_OUTPUTS, GenerateRequest, JsonFormat, TextFormat, as_list
from app.constraint import ANY_OBJECT
from app.engine import MAX_SEED, Constraint, SamplingParams
from app.errors import InvalidRequest
from app.manifest import Defaults

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 128


def check_request(body: GenerateRequest, vocab_size: int, max_rows: int) -> None:
    """Raises InvalidRequest for more answers than one request may ask for, and for tokens that do not exist."""
    if body.max_tokens == 0 and body.n > 1:
        raise InvalidRequest("n: without new tokens there is but one answer for an input", param="n")
    members = len(body.task) if isinstance(body.task, list) else 1
    count = len(as_list(body.input)) * body.n * members
    limit = min(MAX_OUTPUTS, max_rows)
    if count > limit:
        param = "n" if body.n > 1 else "input" if members == 1 else "task"
        raise InvalidRequest(f"{param}: {count} answers exceed {limit} in one request", param=param)
    check_stop_token_ids(body.stop_token_ids or (), vocab_size)


def check_stop_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest."""
    bad = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
    if bad is not None:
        raise InvalidRequest(f"stop_token_ids: {bad} is not in the vocabulary of {vocab_size}", param="stop_token_ids")


def check_logprobs(
    body: GenerateRequest, texts: Sequence[Sequence[int]], defaults: Defaults, rooms: Sequence[int]
) -> None:
    """Raises InvalidRequest for more log-probabilities than one reply may carry; `rooms` as in `sampling_params`."""
    count = 0
    if body.prompt_logprobs is not None:
        count += sum(map(len, texts)) * (1 + body.prompt_logprobs)
    if body.logprobs is not None:
        count += sum(_max_tokens(body, defaults, room) for room in rooms) * body.n * (1 + body.logprobs)
    if count > MAX_LOGPROB_ENTRIES:
        param = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
        raise InvalidRequest(f"{param}: up to {count} exceed {MAX_LOGPROB_ENTRIES} in one reply", param=param)


def sampling_params(
    body: GenerateRequest, defaults: Defaults, room: int, eos_token_ids: frozenset[int], sample: int
) -> SamplingParams:
    """The request's own fields, then the version's defaults, then ours; for answer number `sample` of an input.

    `room` is what the input leaves of the context.
    """
    return SamplingParams(
        max_tokens=_max_tokens(body, defaults, room),
        min_tokens=body.min_tokens,
        temperature=_given(body.temperature, defaults.temperature, 0.0),
        top_p=_given(body.top_p, defaults.top_p, 1.0),
        top_k=_given(body.top_k, defaults.top_k, 0),
        min_p=_given(body.min_p, 0.0),
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        logit_bias=_logit_bias(body),
        seed=body.seed if sample == 0 or body.seed is None else _another_seed(body.seed, sample),
        stop_token_ids=(frozenset() if body.ignore_eos else eos_token_ids) | frozenset(body.stop_token_ids or ()),
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs if sample == 0 else None,
    )


async def constraints(state: State, body: GenerateRequest, count: int) -> list[Constraint | None]:
    """One for each answer. Raises InvalidRequest for a schema that is wrong or too large, and Overloaded."""
    wanted = body.response_format
    if wanted is None or isinstance(wanted, TextFormat):
        return [None] * count
    schema = wanted.json_schema.json_schema if isinstance(wanted, JsonFormat) else ANY_OBJECT
    made = await anyio.to_thread.run_sync(state.constraints.find, schema)
    if made is None:
        made = await state.compiling.run(partial(state.constraints.json_schema, schema))
    return [made, *(made.clone() for _ in range(count - 1))]


def _max_tokens(body: GenerateRequest, defaults: Defaults, room: int) -> int:
    """Only what the request did not ask for gives way to the room."""
    if body.max_tokens is not None:
        return body.max_tokens
    return max(min(defaults.max_tokens or DEFAULT_MAX_TOKENS, max(room, 1)), body.min_tokens)


def _another_seed(seed: int, sample: int) -> int:
    """Within 64 bits; another one for each sample of an input, and the request's own for the first."""
    return (seed + sample * 0x9E3779B97F4A7C15) % MAX_SEED


def _logit_bias(body: GenerateRequest) -> dict[int, float]:
    try:
        # Only what str(int) writes: "007" or " 7" would name one token twice.
        ids = {token: int(token) for token in body.logit_bias or ()}
        if any(str(token_id) != token for token, token_id in ids.items()):
            raise ValueError
    except ValueError:
        raise InvalidRequest("logit_bias: a key is not a token id", param="logit_bias") from None
    return {ids[token]: bias for token, bias in (body.logit_bias or {}).items()}


def _given(*values: T | None) -> T:
    return next(value for value in values if value is not None)
