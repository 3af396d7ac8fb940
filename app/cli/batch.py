"""`softprompt batch`: a file of inputs in, a file of answers out; what was stopped goes on where it was."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from app.cli import errors
from app.cli.answers import AnswerFile, Answers, PrintedAnswers
from app.cli.output import AsJson, err, progress_bar, say, write_json
from app.cli.rows import InvalidRow, Request, Row, read_rows
from app.cli.server import ApiKey, Url, complete_reference, connect, connect_async, finite

if TYPE_CHECKING:
    from app.client import AsyncClient

PATIENCE = 8  # retries of a row; the last waits half a minute

app = typer.Typer()


@app.command(epilog="Example: softprompt batch rows.jsonl answers.jsonl --task sentiment_mixed:1 --classify")
def batch(
    source: Annotated[str, typer.Argument(metavar="IN", help='JSONL of {"input", "task"?, "id"?}; - is stdin')],
    target: Annotated[str, typer.Argument(metavar="OUT", help="JSONL of answers; - is stdout, without resuming")],
    task: Annotated[
        str | None,
        typer.Option(help="Task of the rows that name none; task:7 stays the same", autocompletion=complete_reference),
    ] = None,
    classify: Annotated[bool, typer.Option("--classify", help="Choose a label instead of generating")] = False,
    label: Annotated[list[str] | None, typer.Option(help="A label to choose from; default: the version's")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most new tokens")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy", callback=finite)] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same answers")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be given again")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1_000, help="Rows asked at once")] = 16,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what OUT has, once there is a first answer")
    ] = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Ask for every row of a JSONL file. Started again it goes on, and asks once more for rows that failed.

    OUT is in the order of IN when all is done; a row that fails has an `error`, and the exit code is 6. While it runs,
    rows stand in OUT in the order in which they were answered. With --json a summary on stdout, unless OUT is -.
    """
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": stop or None}
    if classify and any(value is not None for value in options.values()):
        raise typer.BadParameter("takes no options of generation", param_hint="--classify")
    if label and not classify:
        raise typer.BadParameter("needs --classify", param_hint="--label")
    if classify:
        options = {"labels": label or None}
    if task is not None and "," in task:
        raise typer.BadParameter(
            'is one task; a row asks several by a list, {"input": "...", "task": ["a", "b"]}', param_hint="--task"
        )
    _check_apart(source, target)

    def make(row: dict[str, Any]) -> Request:
        return _request(row, task, options)

    kind = "classify" if classify else "generate"

    with ExitStack() as stack:
        lines = stack.enter_context(_opened(source))

        def rows() -> Iterator[Row]:
            lines.seek(0)
            return read_rows(lines, make, kind)

        answers: Answers
        if target == "-":
            answers = PrintedAnswers()
        else:
            answers = stack.enter_context(AnswerFile(Path(target), restart=restart))
        total, done = answers.begin(rows())  # before anything is asked, so that a wrong file is refused at once
        if done < total:
            with connect(url, api_key) as asked:  # a wrong name or address is not the fault of every single row
                asked.model(task) if task is not None else asked.info()
        client = connect_async(url, api_key, connections=concurrency, retries=PATIENCE)
        run = _Run(client, answers, classify)
        left = total - done
        with progress_bar(shown=err.is_terminal and left > 0) as bar:  # if a person looks
            asked_rows = bar.add_task("rows", total=left)
            missing = (row for row in rows() if not answers.is_done(row))
            asyncio.run(run.ask_all(missing, concurrency, lambda: bar.advance(asked_rows)))
        answers.finish()
    summary = {"rows": total, "answered": run.answered, "failed": run.failed, "answered_before": done}
    if as_json and target != "-":
        write_json(summary)
    else:
        say(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in summary.items()))
    if run.failed:
        raise typer.Exit(errors.PARTIAL)


@dataclass
class _Run:
    client: AsyncClient
    answers: Answers
    classify: bool
    answered: int = 0
    failed: int = 0
    error: Exception | None = None  # that every other row would meet too

    async def ask_all(self, rows: Iterator[Row], concurrency: int, advance: Callable[[], None]) -> None:
        """Raises what ended it early, after what was under way has been written."""

        async def ask_some() -> None:
            while self.error is None and (row := next(rows, None)) is not None:
                try:
                    record = await self._ask(row)
                    self.answers.add(record)
                except Exception as error:
                    self.error = self.error or error
                    return
                self.failed += "error" in record
                self.answered += "error" not in record
                advance()

        async with self.client:
            await asyncio.gather(*(ask_some() for _ in range(concurrency)))
        if self.error is not None:
            raise self.error

    async def _ask(self, row: Row) -> dict[str, Any]:
        from app.client import ClientError

        if row.request is None:
            return row.record(error={"code": "invalid_row", "message": row.problem})
        try:
            return row.record(**await self._answer(row.request))
        except ClientError as error:
            if errors.exit_code(error) in _FATAL and error.code not in _OF_ONE_ROW:
                raise
            return row.record(error=errors.describe(error))

    async def _answer(self, request: Request) -> dict[str, Any]:
        if self.classify:
            classified = await self.client.classify(**request)
            [result] = classified.results
            found = {"label": result.label, "probabilities": result.probabilities}
            return {**found, **_made_by(classified), "usage": classified.usage.model_dump(exclude_unset=True)}
        generated = await self.client.generate(**request)
        [output] = generated.outputs
        found = {"output": output.text, "finish_reason": output.finish_reason}
        return {**found, **_made_by(generated), "usage": generated.usage.model_dump(exclude_unset=True)}


_FATAL = (errors.UNREACHABLE, errors.NOT_ALLOWED, errors.BUSY)
_OF_ONE_ROW = ("timed_out", "prompt_corrupt")


def _request(row: dict[str, Any], task: str | None, options: dict[str, Any]) -> Request:
    text, named = row.get("input"), row.get("task", task)
    if not isinstance(text, str):
        raise InvalidRow("a row needs a text as its input")
    several = isinstance(named, list) and named and all(isinstance(name, str) for name in named)
    if not (isinstance(named, str) or several):
        raise InvalidRow("the row names no task, and there is no --task")
    given = {name: value for name, value in options.items() if value is not None}
    return {"task": named, "input": text, **given}


def _made_by(reply: Any) -> dict[str, Any]:
    """The version that answered: an alias may have moved since the row before."""
    if reply.members is not None:
        return {"versions": [f"{member.task}:{member.version}" for member in reply.members]}
    return {"version": None if reply.task is None else f"{reply.task}:{reply.version}"}


@contextmanager
def _opened(source: str) -> Iterator[BinaryIO]:
    """The file, or stdin kept where it can be read twice."""
    if source != "-":
        with open(source, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as kept:
        shutil.copyfileobj(sys.stdin.buffer, kept)
        yield kept


def _check_apart(source: str, target: str) -> None:
    """Raises BadParameter where answers would be written into the rows that are being read."""
    rows, answers = _found(source, sys.stdin), _found(target, sys.stdout)
    if rows is None or answers is None or not stat.S_ISREG(rows.st_mode):
        return
    if os.path.samestat(rows, answers):
        raise typer.BadParameter("IN and OUT are the same file", param_hint="OUT")


def _found(name: str, stream: Any) -> os.stat_result | None:
    """None where there is no file, or none yet."""
    try:
        return os.fstat(stream.fileno()) if name == "-" else os.stat(name)
    except OSError:
        return None
