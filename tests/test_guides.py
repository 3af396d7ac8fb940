"""The commands of docs/guides, run in order on a server of their own: each does what the guide shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.base_model import BaseModel
from tests.console import commands
from tests.shipped import PROMPTS, ROOT, SHIPPED

GUIDES = ROOT / "docs" / "guides"
ADDRESS = "http://127.0.0.1:8000"  # as the documents have it

pytestmark = pytest.mark.model


@contextmanager
def serving(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """`softprompt serve` as a newcomer starts it, in a folder with prompts/; its address."""
    command = [sys.executable, "-m", "app.cli", "serve"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        try:
            line = process.stdout.readline()
            address = re.search(r"http://\S+", line)
            assert address, f"the server did not come up: {line!r}"
            yield address[0]
        finally:
            process.terminate()
            assert process.wait(timeout=60) == 0


@pytest.mark.guides
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", [path.name for path in sorted(GUIDES.glob("*.md"))])
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_a_guide_does_what_it_shows(name: str, default_base: BaseModel, tmp_path: Path) -> None:
    for task in SHIPPED:
        shutil.copytree(PROMPTS / task, tmp_path / "prompts" / task)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    programs = Path(sys.executable).parent
    ours = tmp_path / "bin" / "softprompt"  # of this checkout, whatever is installed
    ours.parent.mkdir()
    ours.write_text(f'#!/bin/sh\nexec {sys.executable} -m app.cli "$@"\n')
    ours.chmod(0o755)
    environment = os.environ | {
        "SOFTPROMPT_CACHE_DIR": str(default_base.path.parent.parent),
        "SOFTPROMPT_DEVICE": "cpu",
        "SOFTPROMPT_PORT": "0",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{ours.parent}:{programs}:{os.environ['PATH']}",
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }
    guide = commands((GUIDES / name).read_text())
    assert guide
    with serving(tmp_path, environment) as address:
        environment["SOFTPROMPT_URL"] = address
        for command in guide:
            command.run(tmp_path, environment, {ADDRESS: address})


def test_the_readme_has_every_guide() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in GUIDES.glob("*.md"):
        assert f"docs/guides/{path.name}" in readme, path.name


def test_links_between_documents_lead_somewhere() -> None:
    for path in [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
