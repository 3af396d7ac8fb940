"""Documents whose commands are run: what a ```console block shows under a command is what the command prints.

Output is compared as JSON where it is JSON, and else line by line, where `...` stands for any text. What differs in
every reply (ids, times) is left out, and numbers are compared to three digits, which a CPU's rounding does not reach.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

VOLATILE = {"id", "created_at", "created", "at", "request_id"}  # differ in every reply

_RESTORE = "if [ -f .exported ]; then . ./.exported; fi"
_KEEP = "status=$?; export -p > .exported; exit $status"


@dataclass(frozen=True)
class Command:
    """A command as a document shows it."""

    text: str
    shown: str  # what stands under it; empty: nothing is said of its output

    def run(self, folder: Path, environment: Mapping[str, str], replace: Mapping[str, str]) -> None:
        """In a shell that knows what commands before it in this folder have exported.

        `replace`: what the document calls by another name than here, e.g. the server's address.
        """
        text, shown = self.text, self.shown
        for name, here in replace.items():
            text, shown = text.replace(name, here), shown.replace(name, here)
        done = subprocess.run(
            ["bash", "-c", f"{_RESTORE}\n{text}\n{_KEEP}"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{self.text}\n{done.stdout}{done.stderr}"
        if shown:
            compare(done.stdout, shown, self.text)


def commands(document: str) -> list[Command]:
    """Of every ```console block, in order; a line that ends with a backslash goes on."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", document, re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            lines = part.splitlines()
            end = next(i for i, line in enumerate(lines) if not line.endswith("\\")) + 1
            found.append(Command("\n".join(lines[:end]), "\n".join(lines[end:]).strip()))
    return found


def compare(printed: str, shown: str, command: str) -> None:
    """Raises AssertionError where they differ."""
    try:
        expected, given = json.loads(shown), json.loads(printed)
    except ValueError:
        lines = [re.sub(r"\s+", " ", line).strip() for line in shown.splitlines()]
        pattern = "\n".join(re.escape(line).replace(re.escape("..."), ".*") for line in lines)
        text = "\n".join(re.sub(r"\s+", " ", line).strip() for line in printed.strip().splitlines())
        assert re.fullmatch(pattern, text, re.S), f"{command}\nprints\n{text}\nnot\n{shown}"
    else:
        assert comparable(given) == comparable(expected), f"{command}\nprints\n{printed}"


def comparable(value: Any) -> Any:
    """Without what differs every time."""
    if isinstance(value, dict):
        return {key: comparable(found) for key, found in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return pytest.approx(value, abs=1e-3) if isinstance(value, float) else value
