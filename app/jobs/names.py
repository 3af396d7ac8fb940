"""Ids of files and jobs. They become names of folders, so nothing else is taken for one."""

from __future__ import annotations

import re
import secrets
import time
from typing import Literal

from app.errors import ReferenceNotFound

Kind = Literal["file", "ftjob"]

_ID = re.compile(r"(file|ftjob)-[0-9a-f]{23}")


def new_id(kind: Kind) -> str:
    """Ids sort by the time they were made, to a millisecond."""
    return f"{kind}-{time.time_ns() // 1_000_000:011x}{secrets.token_hex(6)}"


def is_id(kind: Kind, text: str) -> bool:
    return _ID.fullmatch(text) is not None and text.startswith(f"{kind}-")


def check_id(kind: Kind, text: str) -> None:
    """Raises ReferenceNotFound, as for one that nobody has."""
    if not is_id(kind, text):
        raise unknown(kind)


def unknown(kind: Kind) -> ReferenceNotFound:
    return ReferenceNotFound("there is no such file" if kind == "file" else "there is no such fine-tuning job")
