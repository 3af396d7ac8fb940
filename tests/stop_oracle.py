"""Where a text ends at its stop strings, by definition."""

from __future__ import annotations


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: read character by character; the stop that is whole first wins, the longest of those."""
    for end in range(1, len(text) + 1):
        if whole := [stop for stop in stops if text[:end].endswith(stop)]:
            longest = max(whole, key=len)
            return text[: end - len(longest)], longest
    return text, None
