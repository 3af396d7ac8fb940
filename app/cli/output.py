"""Where commands write: results to stdout, everything said about them to stderr; JSON as one line, unadorned."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NoReturn

import typer
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

BROKEN_PIPE = 141  # what a shell shows for a program that SIGPIPE ended

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else")]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """The reader has what it wanted: `| head`."""
        self.quiet = True
        _leave()


# They find the terminal, its width and NO_COLOR when they print.
out, err = _Console(highlight=False), _Console(stderr=True, highlight=False)


def write(text: str, *, end: str = "\n") -> None:
    """To stdout, as it is; at once."""
    try:
        sys.stdout.write(text + end)
        sys.stdout.flush()
    except BrokenPipeError:
        _leave()


def to_json(value: Any) -> str:
    """One line, in UTF-8 where it can be: half a surrogate pair, which JSON can spell, stays spelt out."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def write_json(value: Any) -> None:
    """One line."""
    write(to_json(value))


def say(text: str) -> None:
    """One line for whoever watches, to stderr."""
    err.print(printable(text), markup=False, soft_wrap=True)


def warn(text: str) -> None:
    err.print("[yellow]warning[/yellow]: ", end="")
    say(text)


def write_table(columns: Iterable[str], rows: Iterable[Iterable[Any]], *, console: Console = out) -> None:
    """One row a line, whole: rich's own would be cut at the terminal's width, or at 80 columns where there is none."""
    cells = [list(columns), *([("" if cell is None else printable(str(cell))) for cell in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    for index, row in enumerate(cells):
        line = "  ".join(set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True))
        console.print(Text(line.rstrip(), style="" if index else "bold"), soft_wrap=True)


def write_facts(facts: Mapping[str, Any]) -> None:
    """A name and a value a line."""
    width = max(map(len, facts), default=0) + 2
    for name, value in facts.items():
        write(f"{name:<{width}}{printable(str(value))}")


def progress_bar(*, console: Console = err, shown: bool = True) -> Progress:
    """A context manager; what is told on stdout and stderr meanwhile stays as it is."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(
        TextColumn("{task.description}"),
        *columns,
        console=console,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not shown,
    )


def printable(text: str, *, keep: str = "") -> str:
    """What came from elsewhere, without the control characters that a terminal obeys."""
    return "".join(
        character if character.isprintable() or character in keep else character.encode("unicode_escape").decode()
        for character in text
    )


def _leave() -> NoReturn:
    # Else the interpreter would try to flush what is left, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise typer.Exit(BROKEN_PIPE)
