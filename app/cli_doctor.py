"""`softprompt doctor` and `softprompt serve --print-config`: how this installation stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.config import Settings, describe
from app.setting_sources import Source

out = Console()


def print_config(settings: Settings, sources: Mapping[str, Source], *, as_json: bool) -> None:
    """Every setting, its value and where it comes from."""
    found = describe(settings, sources)
    if as_json:
        print(json.dumps(found))  # noqa: T201  # rich would wrap it
        return
    table = Table("setting", "value", "source", box=None)
    for name, entry in found.items():
        value = entry["value"]
        shown = ", ".join(value) if isinstance(value, list) else "" if value is None else str(value)
        source = entry["source"] + (f" ({entry['name']})" if entry["name"] else "")
        table.add_row(name, shown, source)
    out.print(table, markup=False, highlight=False)


_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False) -> None:
    """Look at this installation and try the model: each line ok, a warning, or failed. Exit code 1 if any failed."""
    from app.doctor import examine

    checks = []
    for check in examine():
        checks.append(check)
        if not as_json:
            line = f"[{_COLOURS[check.status]}]{check.status:8}[/] {check.name:15} {escape(_printable(check.found))}"
            advice = f"\n{'':25}→ {escape(_printable(check.advice))}" if check.advice else ""
            out.print(line + advice, highlight=False, soft_wrap=True)
    worst = max((check.status for check in checks), key=list(_COLOURS).index)
    if as_json:
        found = [{name: _printable(value) for name, value in vars(check).items()} for check in checks]
        print(json.dumps({"status": worst, "checks": found}))  # noqa: T201
    raise typer.Exit(1 if worst == "failed" else 0)


def _printable(text: str) -> str:
    """One line without control characters, which names of files may have."""
    return "".join(character if character.isprintable() else "?" for character in text)
