"""Answers that must be JSON of a given shape: a grammar says before every token which ones may follow.

The grammars are llguidance's. It reads nothing but the schema (no `$ref` is ever fetched) and has limits on its work,
but not on all of it: an `allOf` of thirty patterns keeps it busy for ever. So a schema is first tried in a process
of its own that may use one second; only what survives is compiled here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Collection
from functools import cached_property
from threading import Lock
from typing import Any, TypeVar

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from app.errors import EngineFailed, InvalidRequest, Overloaded
from app.strict_json import shorten

T = TypeVar("T")

MAX_SCHEMA_BYTES = 64 * 1024
MAX_CACHED = 32  # compiled schemas
MAX_REFUSALS = 256  # remembered, because finding out again may cost a second each
ANY_OBJECT: dict[str, Any] = {"type": "object"}
TRIAL_SECONDS = 20  # by the clock, for a trial whose second of processor time comes slowly on a busy machine

# Separators as Python writes them, because white space of the model's choice may have no end; nothing is lenient,
# because a part of the schema that was skipped would be a promise not kept.
_OPTIONS: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}

_TRIAL = """
import os, sys
from llguidance import LLMatcher
try:
    import resource
except ImportError:  # Windows has only the time by the clock
    pass
else:
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
is_error, messages = LLMatcher.validate_grammar_with_warnings(sys.stdin.read())
sys.stdout.write(messages[0] if is_error else "")
"""


class JsonConstraint:
    """One generation's place in a grammar; an `app.engine.Constraint`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._mask = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)  # never changed in place

    def clone(self) -> JsonConstraint:
        """Another one at the same place, for the next sample of a request."""
        copy = JsonConstraint(self._matcher.deep_copy(), 32 * len(self._mask))
        copy._mask = self._mask
        return copy

    def mask(self) -> torch.Tensor:
        """int32 [ceil(vocab_size / 32)]; an end-of-sequence token is allowed where the text is complete.

        Raises InvalidRequest if the grammar needs more work than llguidance's limits allow.
        """
        found = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())
        # A model may have more tokens than its tokenizer, rounded up for speed, and, rarely, fewer.
        self._mask = torch.zeros_like(self._mask)
        size = min(len(self._mask), len(found))
        self._mask[:size] = found[:size]
        return self._mask

    def accept(self, token_id: int) -> bool:
        """Take a token that the last `mask` allowed; True when nothing but the end may follow.

        Raises EngineFailed for any other token, InvalidRequest as `mask` does.
        """
        if not self._matcher.consume_token(token_id):
            if not int(self._mask[token_id // 32]) >> (token_id % 32) & 1:
                raise EngineFailed("the constraint does not allow the token")
            raise _refused(self._matcher.get_error())
        return self._matcher.is_stopped()


class ConstraintCompiler:
    """Makes constraints for one tokenizer. Threads may share it; it can block for seconds: not for the event loop."""

    def __init__(self, tokenizer: Any, eos_token_ids: Collection[int], vocab_size: int) -> None:
        """`tokenizer` is a fast one; `vocab_size` the model's."""
        self._hf_tokenizer = tokenizer
        self._eos_token_ids = sorted(eos_token_ids)
        self._vocab_size = vocab_size
        self._compiled: OrderedDict[str, JsonConstraint] = OrderedDict()  # least recently used first, as in the next
        self._refusals: OrderedDict[str, str] = OrderedDict()  # messages
        self._lock = Lock()  # guards both
        self._trial = Lock()  # hostile schemas get one processor together

    def json_object(self) -> JsonConstraint:
        """Any JSON object."""
        return self.json_schema(ANY_OBJECT)

    def find(self, schema: dict[str, Any]) -> JsonConstraint | None:
        """What `json_schema` would give or raise, if that is known or soon found out; else None."""
        return self._find(_serialise(schema))

    def json_schema(self, schema: dict[str, Any]) -> JsonConstraint:
        """JSON that fits the schema, in one line, properties in the schema's order.

        Raises InvalidRequest (param "response_format") for a schema that is no schema, is larger than 64 KiB, asks
        for what cannot be guaranteed, e.g. `not` or a remote `$ref`, or takes too long to compile; Overloaded if this
        machine is too busy to tell.
        """
        text = _serialise(schema)
        if found := self._find(text):
            return found
        with self._trial:
            # Once more: another one may have asked for the same while this one waited.
            return self._find(text) or self._compile(text)

    def _find(self, text: str) -> JsonConstraint | None:
        with self._lock:
            if text in self._refusals:
                self._refusals.move_to_end(text)
                raise InvalidRequest(self._refusals[text], param="response_format")
            if text in self._compiled:
                self._compiled.move_to_end(text)
                return self._compiled[text].clone()
        return None

    def _compile(self, text: str) -> JsonConstraint:
        try:
            constraint = self._first_of(text)
        except InvalidRequest as error:
            with self._lock:
                _remember(self._refusals, text, error.message, MAX_REFUSALS)
            raise
        with self._lock:
            _remember(self._compiled, text, constraint, MAX_CACHED)
        return constraint.clone()

    def _first_of(self, text: str) -> JsonConstraint:
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS)
        except ValueError as error:
            raise _refused(str(error)) from error
        _try(grammar)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        constraint = JsonConstraint(matcher, self._vocab_size)
        if not constraint.mask().any():
            raise _refused("no text fits it")
        for beginning in ("{", "[{"):  # only there an object turns out to have too many properties to choose from
            begun = matcher.deep_copy()
            begun.try_consume_tokens(self._tokenizer.tokenize_str(beginning))
            JsonConstraint(begun, self._vocab_size).mask()
        return constraint

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return from_tokenizer(self._hf_tokenizer, eos_token=self._eos_token_ids)


def _remember(memory: OrderedDict[str, T], text: str, value: T, limit: int) -> None:
    memory[text] = value
    if len(memory) > limit:
        memory.popitem(last=False)


def _serialise(schema: dict[str, Any]) -> str:
    # llguidance would take options from this key, which are ours to choose.
    plain = {key: value for key, value in schema.items() if key != "x-guidance"}
    try:
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except RecursionError:
        raise _refused("it is nested too deep") from None
    except (TypeError, ValueError):  # the latter for NaN and lone surrogates too
        raise _refused("it is not JSON") from None
    if size > MAX_SCHEMA_BYTES:
        raise _refused(f"it has {size} bytes, and may have {MAX_SCHEMA_BYTES}")
    return text


def _try(grammar: str) -> None:
    """Compile without a tokenizer, in a process that is killed when it takes too long or too much memory."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _TRIAL],
            input=grammar.encode(),
            capture_output=True,
            timeout=TRIAL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        # Hostile or not: processor time is what it ran out of first, on a machine that had some.
        raise Overloaded("the JSON schema could not be tried in time") from None
    if done.returncode:
        raise _refused("it takes too long, or too much memory, to compile")
    if done.stdout:
        raise _refused(done.stdout.decode(errors="replace"))


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(f"the JSON schema cannot be used: {_summary(reason)}", param="response_format")


def _summary(error: str) -> str:
    """Of llguidance's message, which may go on with the state of its parser, or end with what is wrong."""
    lines = error.strip().splitlines() or [""]
    if lines[0].startswith("NoExtension"):
        return "no text fits it"
    return shorten(lines[-1] if lines[-1].startswith("error: ") else lines[0], 200)[1:-1]
