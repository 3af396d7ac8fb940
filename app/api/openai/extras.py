"""Fields that a body has and a route does not: harmless ones are named in a header, the others refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from app.errors import InvalidRequest

HEADER = "X-Ignored-Fields"
MAX_IGNORED = 32

# They change the answer, or are a promise about it, and nothing here keeps it.
UNSUPPORTED = frozenset(
    {
        *("tools", "functions", "tool_choice", "function_call", "web_search_options", "modalities", "audio", "suffix"),
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend"),
        *("structured_outputs", "structural_tag", "grammar", "json_schema", "regex", "ebnf", "bad_words"),
        *("allowed_token_ids", "logits_processors", "use_beam_search", "length_penalty", "early_stopping"),
        *("prompt_logprobs", "prompt_embeds", "prompt_token_ids", "chat_template", "chat_template_kwargs"),
        *("add_generation_prompt", "continue_final_message", "add_special_tokens", "documents", "echo", "best_of"),
        *("return_tokens_as_token_ids", "thinking_token_budget", "typical_p", "top_a", "mirostat", "min_length"),
        *("dry_multiplier", "xtc_probability", "no_repeat_ngram_size", "task", "input", "raw", "version", "lora"),
    }
)
# Values by which a client says what holds anyway, besides null: those of a field that is not here are EMPTY.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "length_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "best_of": (1,),
    "prompt_logprobs": (),
    "guided_json": (),
    "json_schema": (),
}
EMPTY: tuple[Any, ...] = (False, 0, 0.0, "", [], {})
# They say nothing about the text; without them here, some would look like misspelt ones.
HARMLESS = frozenset(
    {
        *("store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("parallel_tool_calls", "prediction", "reasoning_effort", "verbosity", "priority", "request_id"),
    }
)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


def ignored_fields(body: BaseModel) -> list[str]:
    """The names of the fields that make no difference.

    Raises InvalidRequest for one that would, for one that looks like a misspelt field, and for what is no name.
    """
    extra = body.model_extra or {}
    if len(extra) > MAX_IGNORED:
        raise InvalidRequest(f"the body has more than {MAX_IGNORED} fields that this route does not know")
    for name, value in extra.items():
        if _NAME.fullmatch(name) is None:
            raise InvalidRequest("the body has a field that this route does not know")
        if name in UNSUPPORTED:
            neutral = (None, *NEUTRAL.get(name, EMPTY))
            if not any(type(value) is type(known) and value == known for known in neutral):
                raise InvalidRequest(f"{name}: is not supported by this route", param=name)
        elif name not in HARMLESS:
            near = difflib.get_close_matches(name, type(body).model_fields, 1, 0.85)
            if near:
                raise InvalidRequest(f"{name}: there is no such parameter; is it {near[0]}?", param=name)
    return list(extra)
