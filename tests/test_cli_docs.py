"""What is said about the command line is so, and what holds for every command."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.cli import errors
from app.client import Client
from app.errors import InvalidSettings, PreconditionFailed, ReferenceNotFound
from tests.api_harness import Harness, files
from tests.cli_harness import COMMAND
from tests.shipped import ROOT

PAGE = (ROOT / "docs" / "cli.md").read_text()


def leaves(command: Any = COMMAND, path: tuple[str, ...] = ("softprompt",)) -> Iterator[tuple[str, Any]]:
    for name, below in getattr(command, "commands", {}).items():
        yield from leaves(below, (*path, name))
    if not hasattr(command, "commands"):
        yield " ".join(path), command


LEAVES = dict(leaves())


def parse(line: str) -> str:
    """The command of a line, whose arguments are what it takes; it is not run."""
    words = shlex.split(re.sub(r" (<|>|\|) .*", "", line))
    name = next(" ".join(words[:size]) for size in (3, 2) if " ".join(words[:size]) in LEAVES)
    LEAVES[name].make_context(name, words[len(name.split()) :])
    return name


def test_the_table_has_every_command_and_no_other() -> None:
    assert set(re.findall(r"^\| `(softprompt [^`]+)` \|", PAGE, re.M)) == set(LEAVES)


def test_the_table_of_exit_codes_is_the_one_in_the_code_and_in_the_help() -> None:
    rows = {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| (.+) \|$", PAGE, re.M)}
    assert rows == errors.MEANINGS
    assert all(f"{code} {meaning}" in COMMAND.epilog for code, meaning in rows.items())


def test_every_line_of_the_page_can_be_typed() -> None:
    lines = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
    assert len(lines) > 15 and all(parse(line) for line in lines)


@pytest.mark.parametrize("name", LEAVES)
def test_every_command_has_a_help_an_example_and_json(name: str) -> None:
    command = LEAVES[name]
    assert command.help
    example = re.fullmatch(r"Examples?: (softprompt .+)", command.epilog or "")
    assert example and [parse(line) for line in example[1].split("; ")][0] == name
    options = {option for parameter in command.params for option in parameter.opts}
    assert "--json" in options or name == "softprompt serve"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ReferenceNotFound("x"), 4),
        (PreconditionFailed("x"), 5),
        (InvalidSettings("x"), 2),
        (FileNotFoundError(2, "No such file", "a"), 1),
    ],
)
def test_exit_codes_of_what_fails_here(error: Exception, code: int) -> None:
    assert errors.is_known(error) and errors.exit_code(error) == code
    assert not errors.is_known(ValueError("a fault of ours"))


def started(*arguments: str, **options: Any) -> Any:
    return subprocess.Popen([sys.executable, "-m", "app.cli", *arguments], cwd=ROOT, **options)


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = started("--version", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    with process.stderr as err:
        assert (process.wait(timeout=60), err.read()) == (141, b"")


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colour_is_for_terminals_and_not_for_those_who_decline(no_color: str) -> None:
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "100"} | ({"NO_COLOR": no_color} if no_color else {})
    process = started("list", "--deleted", stderr=theirs, stdout=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    assert process.wait(timeout=60) == 2
    told = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "error" in told and "needs a task" in told and ("\x1b[31m" in told) == (not no_color)


def test_the_shell_is_told_how_to_complete() -> None:
    environment = os.environ | {
        "_SOFTPROMPT_COMPLETE": "complete_bash",
        "COMP_WORDS": "softprompt\nro",
        "COMP_CWORD": "1",
    }
    process = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'softprompt'; from app.cli import main; main.main()"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.stdout.split() == ["rollback"] and process.stderr == ""


def test_the_python_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harness = Harness.create(tmp_path / "prompts")
    folder = tmp_path / "out" / "my_task"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(files()["adapter_config"])
    (folder / "adapter_model.safetensors").write_bytes(files()["adapter_model"])
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    with harness.listening() as server:
        capsys.readouterr()
        exec(code.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{server.port}"), {})
        with Client(f"http://127.0.0.1:{server.port}") as client:
            assert client.alias("my_task", "prod").version == 1
    assert capsys.readouterr().out.endswith("['my_task']\n")
