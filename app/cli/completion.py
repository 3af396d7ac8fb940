"""Completion in bash, which takes `mood@prod`, `mood:7` and `--task=mood` for several words (COMP_WORDBREAKS)."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, MutableMapping
from contextlib import redirect_stdout

from app.cli.output import write

BREAKS = ":@="  # those of bash's own that stand within our arguments
_VARIABLE = "_SOFTPROMPT_COMPLETE"


def is_for_bash() -> bool:
    """Whether this process was started by the function that `--install-completion` gives to bash."""
    return os.environ.get(_VARIABLE) == "complete_bash"


def complete_in_bash(complete: Callable[[], object]) -> None:
    """Have `complete` see whole arguments, and of what it prints only what bash puts in the place of its last word."""
    before = join_words(os.environ)
    found = io.StringIO()
    try:
        with redirect_stdout(found):
            complete()
    finally:
        for line in found.getvalue().splitlines():
            write(line[before:])


def join_words(environment: MutableMapping[str, str]) -> int:
    """Undo bash's splitting in COMP_WORDS; how many characters of the last argument stay before what bash replaces.

    What stood apart is joined too, where a mark stands between: bash does not tell, and no argument is a mark alone.
    """
    words, place = environment.get("COMP_WORDS", "").split("\n"), int(environment.get("COMP_CWORD", "0"))
    joined: list[str] = []
    mark = False
    for word in words[: place + 1]:
        after_mark, mark = mark, bool(word) and not word.strip(BREAKS)
        if len(joined) > 1 and (mark or after_mark):
            joined[-1] += word
        else:
            joined.append(word)
    environment["COMP_WORDS"], environment["COMP_CWORD"] = "\n".join(joined), str(len(joined) - 1)
    if len(joined) > place:
        return 0
    option, is_equals, value = joined[-1].partition("=")
    argument = value if is_equals and option.startswith("--") else joined[-1]
    before = len(argument) if mark else len(argument) - len(words[place])
    # NOTE: readline counts an @ to the word behind it (rl_special_prefixes), though COMP_WORDS has it apart.
    return before - (argument[:before].endswith("@"))
