"""Values of options that are more than a number or a word."""

from __future__ import annotations

import re
from typing import Literal

import typer

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3_600}


def unescape(text: str) -> str:
    """A shell's "\\n" and "\\t" as line feed and tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise typer.BadParameter(f"{text!r} is not key=value", param_hint="--source")
    return key, value


def seconds(text: str) -> float:
    """ "90", "90s", "10m" or "2h" in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no time such as 90s, 10m or 2h", param_hint="--budget")
    return float(found[1]) * _UNITS[found[2]]


def learning_rate(text: str | None) -> float | Literal["auto"] | None:
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor auto", param_hint="--learning-rate") from None
