"""`softprompt doctor` and `softprompt serve --print-config`: how this installation stands."""

from __future__ import annotations

from collections.abc import Mapping

import typer
from rich.markup import escape

from app.cli.output import AsJson, out, printable, write_json, write_table
from app.config import Settings, describe
from app.setting_sources import Source

app = typer.Typer()
_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def print_config(settings: Settings, sources: Mapping[str, Source], *, as_json: bool) -> None:
    """Every setting, its value and where it comes from."""
    found = describe(settings, sources)
    if as_json:
        write_json(found)
        return
    rows = []
    for name, entry in found.items():
        value = entry["value"]
        shown = ", ".join(value) if isinstance(value, list) else "" if value is None else str(value)
        rows.append((name, shown, entry["source"] + (f" ({entry['name']})" if entry["name"] else "")))
    write_table(("setting", "value", "source"), rows)


@app.command(epilog="Example: softprompt doctor")
def doctor(as_json: AsJson = False) -> None:
    """Look at this installation and try the model: each line ok, a warning, or failed. Exit code 1 if any failed."""
    from app.doctor import examine

    checks = []
    for check in examine():
        checks.append(check)
        if not as_json:
            line = f"[{_COLOURS[check.status]}]{check.status:8}[/] {check.name:15} {escape(printable(check.found))}"
            advice = f"\n{'':25}→ {escape(printable(check.advice))}" if check.advice else ""
            out.print(line + advice, soft_wrap=True)
    worst = max((check.status for check in checks), key=list(_COLOURS).index)
    if as_json:
        found = [vars(check) for check in checks]
        write_json({"status": worst, "checks": found})
    raise typer.Exit(1 if worst == "failed" else 0)
