"""Imports go one way, and importing a module does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

APP = Path(__file__).resolve().parent.parent / "app"

# Lower layers first: a module may import its own layer and those before it, never one after it.
LAYERS = [
    {"errors", "strict_json"},
    {"text", "soft_prompt", "safetensors_header", "setting_sources", "logs", "urls"},
    {"manifest", "adapter_config", "fingerprint", "model_source", "config"},
    {"checkpoint", "base_model", "engine"},
    {"registry", "answer", "constraint", "local_engine", "inspection"},
    {"train", "access", "client"},
    {"jobs"},
    {"api"},
    {"main", "doctor"},
    {"cli"},
]
WEB = {
    "fastapi",
    "starlette",
    "uvicorn",
    "pydantic",
    "pydantic_settings",
    "httpx",
    "typer",
    "rich",
    "prometheus_client",
    "structlog",
    "opentelemetry",
}
FORBIDDEN = {  # part of the product -> what it must never import, at any depth of its own files
    "engine": WEB | {"tokenizers", "peft", "llguidance"},
    "engine/scheduler": {"torch", "transformers", "numpy"},
    "engine/block_manager": {"torch", "transformers", "numpy"},
    "engine/sequence": {"torch", "transformers", "numpy"},
    "engine/waiting": {"torch", "transformers", "numpy"},
    "client": {"torch", "transformers", "numpy", "fastapi", "starlette", "typer", "rich"},
    "access": WEB | {"torch", "transformers"},
    "registry": WEB - {"pydantic"} | {"torch", "transformers"},
}


def modules() -> list[Path]:
    return sorted(APP.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module a file names in an import, wherever it stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            if node.module == "app":
                names |= {f"app.{alias.name}" for alias in node.names}
    return names


def part(module: str) -> str:
    """ "app.registry.store" -> "registry"."""
    return (module.split(".") + [""])[1]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(APP)))
def test_one_way(path: Path) -> None:
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    own = path.relative_to(APP).with_suffix("").parts[0]
    if own == "__init__":
        assert not imported(path) - {"__future__"}
        return
    assert own in rank, f"app/{own} has no layer yet: give it one in LAYERS"
    for module in sorted(imported(path)):
        if module.startswith("app.") and module != "app.__version__":
            assert part(module) in rank, f"app/{part(module)} has no layer yet: give it one in LAYERS"
            assert rank[part(module)] <= rank[own], f"app/{own} must not import {module}"


@pytest.mark.parametrize("place", FORBIDDEN)
def test_forbidden(place: str) -> None:
    found = sorted((APP / place).rglob("*.py")) or [(APP / place).with_suffix(".py")]
    for path in found:
        roots = {module.split(".")[0] for module in imported(path)}
        assert not roots & FORBIDDEN[place], path


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(APP)))
def test_extras_are_imported_only_where_they_are_asked_for(path: Path) -> None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {name.split(".")[0] for name in names} & {"opentelemetry", "psycopg", "flashinfer"}, path


def test_training_needs_no_server_and_the_engine_runs_without_the_web() -> None:
    """A GPU machine trains with torch, transformers, peft, safetensors and pydantic alone, and needs no more to answer.

    In one process: it takes long to start.
    """
    tell = "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    script = f"import sys, app.train.trainer; {tell}; import app.engine.local; {tell}"
    done = subprocess.run([sys.executable, "-c", script], cwd=APP.parent, capture_output=True, text=True, check=True)
    training, both = (set(line.split()) for line in done.stdout.splitlines())
    web = {"fastapi", "starlette", "pydantic_settings", "uvicorn", "typer", "rich", "structlog", "prometheus_client"}
    assert not training & (web | {"sqlalchemy", "llguidance"})
    assert not both & web


def test_keys_are_made_without_a_model() -> None:
    script = "import sys, app.cli.keys, app.access; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=APP.parent, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "fastapi"}


def test_a_server_is_asked_without_a_model() -> None:
    """So that `softprompt list` is there at once."""
    script = "import sys, app.cli, app.client; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=APP.parent, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "fastapi", "starlette", "numpy", "sqlalchemy"}
