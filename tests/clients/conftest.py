"""A real `softprompt serve` over the shipped prompts, for clients that live in an environment of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("SOFTPROMPT_BIN") or ROOT / ".venv" / "bin" / "softprompt")
SHIPPED = ("address_parse", "sentiment_mixed")
BASE = "smollm2-135m-instruct"

# Nothing is fetched: hubs are off for the clients too, and no client reports home.
OFFLINE = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK"), "1")
os.environ.update(OFFLINE)


@dataclass(frozen=True)
class Server:
    address: str  # http://host:port
    registry: Path
    tokenizer: Path  # folder of the base model

    @property
    def url(self) -> str:
        return f"{self.address}/v1"

    def softprompt(self, *arguments: str) -> Any:
        """What the command line says with these arguments, over the same registry, as JSON."""
        return json.loads(_softprompt(arguments, self.registry))


def _environment(registry: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("SOFTPROMPT_") and name != "PORT"}
    return own | {"SOFTPROMPT_REGISTRY": str(registry), "SOFTPROMPT_PORT": "0", "SOFTPROMPT_DEVICE": "cpu"}


def _softprompt(arguments: tuple[str, ...], registry: Path) -> str:
    command = [str(BIN), *arguments]
    return subprocess.run(
        command, env=_environment(registry), check=True, capture_output=True, text=True, timeout=600
    ).stdout


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    registry = tmp_path_factory.mktemp("registry") / "prompts"
    for name in SHIPPED:
        shutil.copytree(ROOT / "prompts" / name, registry / name)
    tokenizer = Path(json.loads(_softprompt(("model", "show", "--json"), registry))["path"])
    with subprocess.Popen(
        [str(BIN), "serve"], cwd=registry.parent, env=_environment(registry), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://\S+", line)
        assert address, f"the server did not come up: {line!r}"
        yield Server(address[0], registry, tokenizer)
        process.terminate()
        assert process.wait(timeout=60) == 0, "the server ends as it was told to"


def rows(task: str, count: int) -> list[dict[str, str]]:
    """The first test rows of the task's example data."""
    with (ROOT / "examples" / "data" / task / "test.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def write_rows(path: Path, found: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of docs/clients.md: one row for each test, by its first line of docstring."""
    table = ["| client | what | result |", "|---|---|---|"]
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            properties = dict(report.user_properties)
            if "client" in properties:
                table.append(f"| {properties['client']} | {properties['what']} | {outcome} |")
    terminalreporter.write_line("\n" + "\n".join(table))


@pytest.fixture(autouse=True)
def _row(request: pytest.FixtureRequest, record_property: Any) -> None:
    """Each module names the package it tests in CLIENT."""
    client = request.module.CLIENT
    record_property("client", f"{client} {version(client)}")
    record_property("what", (request.function.__doc__ or request.function.__name__).splitlines()[0].strip().rstrip("."))
