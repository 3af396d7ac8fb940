"""`softprompt generate` and `softprompt classify`: one input, or a conversation of single ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli import errors
from app.cli.output import AsJson, printable, say, write, write_json, write_table
from app.cli.server import ApiKey, Url, complete_reference, connect, finite
from app.config import Settings

if TYPE_CHECKING:
    from app.client import Client
    from app.client.calls import GenerateOptions

HISTORY_LENGTH = 1_000  # inputs
PROMPT = "> "

app = typer.Typer()

Tasks = Annotated[
    str,
    typer.Argument(
        help="task, task:7, task@alias; several with commas are an ensemble; the base model's name is the bare model",
        autocompletion=complete_reference,
    ),
]
Input = Annotated[
    str | None, typer.Argument(help="The input; - reads stdin, as does none at all where stdin is no terminal")
]
User = Annotated[str | None, typer.Option(help="Who asks: a canary gives the same user the same version")]
Deadline = Annotated[
    float | None, typer.Option(help="Seconds after which the server gives up", min=0.001, callback=finite)
]


@app.command(epilog="Example: softprompt generate address_parse '901 Hamlet St, Evanston, IL 60202' --max-tokens 40")
def generate(
    task: Tasks,
    text: Input = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Ask for inputs, one a line, until Ctrl-D")
    ] = False,
    stream: Annotated[
        bool | None, typer.Option(help="Write the answer as it comes; default: unless --json, --n or an ensemble")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most new tokens")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy", callback=finite)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Share of the probability to sample from", callback=finite)
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="So many tokens to sample from")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same answer")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given again")] = None,
    n: Annotated[int | None, typer.Option("--n", help="So many answers")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Without the version's template and defaults")] = False,
    user: User = None,
    deadline: Deadline = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Generate text behind a soft prompt.

    With --json one document, or with --json --stream an event a line.
    """
    options: GenerateOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or None,
        "n": n,
        "raw": raw or None,
        "user": user,
    }
    members = _members(task)
    if stream is None:
        stream = not (as_json or isinstance(members, list) or (n or 1) > 1)
    if stream and (n or 1) > 1 and not as_json:
        raise typer.BadParameter(
            "would mix the pieces of --n answers; with --json each says whose it is", param_hint="--stream"
        )

    def answer(client: Client, given: str) -> None:
        if stream:
            _stream(client, members, given, deadline, options, as_json=as_json)
            return
        found = client.generate(members, given, deadline=deadline, **options)
        if as_json:
            write_json(found.model_dump(exclude_unset=True))
        else:
            for output in found.outputs:
                write(_for_terminal(output.text))

    with connect(url, api_key) as client:
        if interactive or (text is None and sys.stdin.isatty()):
            _converse(client, answer)
        else:
            answer(client, _input(text))


@app.command(epilog="Example: softprompt classify sentiment_mixed 'I love my team.'")
def classify(
    task: Tasks,
    text: Input = None,
    label: Annotated[list[str] | None, typer.Option(help="A label to choose from; default: the version's")] = None,
    user: User = None,
    deadline: Deadline = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Choose a label for an input; prints the likeliest first, with its probability."""
    with connect(url, api_key) as client:
        found = client.classify(_members(task), _input(text), labels=label or None, user=user, deadline=deadline)
    if as_json:
        write_json(found.model_dump(exclude_unset=True))
        return
    for result in found.results:
        ranked = sorted(result.probabilities.items(), key=lambda item: -item[1])
        write_table(("label", "probability"), ((name, f"{share:.4f}") for name, share in ranked))


def _stream(
    client: Client,
    task: str | list[str],
    text: str,
    deadline: float | None,
    options: GenerateOptions,
    *,
    as_json: bool,
) -> None:
    begun = False
    try:
        with client.stream(task, text, deadline=deadline, **options) as events:
            for event in events:
                if as_json:
                    write_json(event.model_dump(exclude_unset=True))
                elif event.text:
                    begun = True
                    write(_for_terminal(event.text), end="")
    finally:
        if begun:
            write("")


def _converse(client: Client, answer: Any) -> None:
    """Each line is an input by itself. Ctrl-C ends the answer, Ctrl-D the program."""
    from app.client import ClientError

    with _line_editing():
        while True:
            try:
                # input() writes its prompt to stdout, where only answers belong, unless that is a terminal.
                if not sys.stdout.isatty():
                    sys.stderr.write(PROMPT)
                text = input(PROMPT if sys.stdout.isatty() else "")
            except EOFError:
                sys.stderr.write("\n")
                return
            except KeyboardInterrupt:
                sys.stderr.write("\n")
                continue
            if not text.strip():
                continue
            try:
                answer(client, _sendable(text))
            except KeyboardInterrupt:
                say("interrupted")
            except ClientError as error:
                errors.report(error, as_json=False)


@contextmanager
def _line_editing() -> Iterator[None]:
    """Lines can be edited and come back in the next session, where the system has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    kept = Settings.load().cache_dir / "history"
    readline.set_history_length(HISTORY_LENGTH)
    _try(lambda: readline.read_history_file(kept))
    try:
        yield
    finally:
        _try(lambda: _write_history(kept, readline))


def _write_history(kept: Path, readline: Any) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.touch(mode=0o600)  # inputs are nobody else's to read
    readline.write_history_file(kept)


def _try(step: Any) -> None:
    """A history that cannot be read or kept is no reason to stop."""
    try:
        step()
    except OSError:
        return


def _input(text: str | None) -> str:
    """The argument, or stdin without its last line feed."""
    if text is None and sys.stdin.isatty():
        raise typer.BadParameter("give a text, or - and pipe it in", param_hint="TEXT")
    if text is None or text == "-":
        return _sendable(sys.stdin.read().removesuffix("\n"))
    return _sendable(text)


def _sendable(text: str) -> str:
    """Python keeps bytes that are no UTF-8 as half surrogates, which no JSON document can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("the text is not UTF-8", param_hint="TEXT") from None
    return text


def _members(task: str) -> str | list[str]:
    names: Sequence[str] = task.split(",")
    return task if len(names) == 1 else list(names)


def _for_terminal(text: str) -> str:
    """Whoever writes a prompt must not move somebody's cursor; a file gets the text as it is."""
    return printable(text, keep="\n\t") if sys.stdout.isatty() else text
