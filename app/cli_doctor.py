"""`softprompt serve --print-config`: how this installation stands."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rich.console import Console
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
