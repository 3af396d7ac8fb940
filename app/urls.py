"""URLs as they may be shown."""

from __future__ import annotations

import re

_USER = re.compile(r"^([^/?#@]*//)?.*@", re.DOTALL)


def without_password(url: str) -> str:
    """A URL, or what was given for one, without a user's name and password.

    All that stands before the last @ goes: a password may hold anything, and what is shown need not be a URL.
    """
    return _USER.sub(r"\1***@", url)
