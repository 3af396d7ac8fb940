"""The command line as its user sees it, in this process."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import pytest
from typer.main import get_command

from app.cli import main

COMMAND = get_command(main.app)  # built once: it takes longer than most commands


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document that stdout must be."""
        [line] = self.out.splitlines()
        return json.loads(line)

    @property
    def documents(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> Any:
        """The error document."""
        assert self.out == ""
        [line] = self.err.splitlines()
        return json.loads(line)["error"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(*arguments: object, stdin: str | bytes = "", terminal: bool = False, expect: int | None = 0) -> Done:
    """What `softprompt ARGUMENTS` writes and ends with; `terminal`: a person sits at stdin and stdout."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    given = Terminal(data.decode()) if terminal else io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    out, err = Terminal() if terminal else io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["softprompt", *map(str, arguments)])
        patch.setattr(sys, "stdin", given)
        patch.setattr("typer.main.get_command", lambda _: COMMAND)
        with pytest.raises(SystemExit) as exit_:
            main.main()
    code = exit_.value.code or 0
    assert isinstance(code, int)
    done = Done(code, out.getvalue(), err.getvalue())
    assert expect is None or code == expect, done
    return done
