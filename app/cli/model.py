"""`softprompt model`: the base model that this machine has."""

from __future__ import annotations

from typing import Any

import typer

from app.cli.output import AsJson, write, write_facts, write_json
from app.config import Settings

app = typer.Typer(no_args_is_help=True, help="The base model.")


@app.command(epilog="Example: softprompt model pull")
def pull(as_json: AsJson = False) -> None:
    """Fetch and convert the base model into the cache, once."""
    settings = Settings.load()
    from app.model_source import fetch_base_model

    path = str(fetch_base_model(settings.model, cache_dir=settings.cache_dir))
    if as_json:
        write_json({"path": path})
    else:
        write(path)


@app.command(epilog="Example: softprompt model show --json")
def show(as_json: AsJson = False) -> None:
    """Name, fingerprint and dimensions of the base model."""
    base = load(Settings.load())
    facts: dict[str, Any] = vars(base.info) | {
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "path": str(base.path),
    }
    if as_json:
        write_json(facts)
    else:
        write_facts(facts)


def load(settings: Settings) -> Any:
    """The base model of the settings."""
    from app.local_engine import load_base  # torch and transformers take seconds that --help need not

    return load_base(settings)
