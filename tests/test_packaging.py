"""The files around the package agree with each other and with the settings."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from app.config import variables

REPO = Path(__file__).resolve().parent.parent


def pins() -> dict[str, str]:
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    split = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in split}


def test_every_dependency_has_a_tested_version_in_its_range() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"], *extras["otel"], *extras["postgres"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), text


def test_pins_name_no_local_build() -> None:
    assert not [name for name, version in pins().items() if "+" in version]


def test_the_dockerfile_installs_the_tested_torch_and_sets_real_settings() -> None:
    text = (REPO / "Dockerfile").read_text(encoding="utf-8")
    assert f'ARG TORCH="torch=={pins()["torch"]}"' in text
    named = set(re.findall(r"\bSOFTPROMPT_[A-Z_]+", text))
    assert {"SOFTPROMPT_HOST", "SOFTPROMPT_REGISTRY", "SOFTPROMPT_CACHE_DIR"} <= named
    assert named <= set(variables())


def test_make_help_lists_every_target() -> None:
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[0] for line in shown.splitlines()] == phony.split()


def test_the_dockerfile_runs_commands_without_a_shell() -> None:
    text = (REPO / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^(?:ENTRYPOINT|CMD|HEALTHCHECK .*CMD) +(.*)$", text, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert all(isinstance(word, str) for word in json.loads(command))
