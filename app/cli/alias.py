"""`softprompt alias` and `softprompt rollback`: what names stand for, moved by compare-and-swap."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.output import AsJson, say, write_json, write_table
from app.cli.server import ApiKey, TaskName, Url, connect

if TYPE_CHECKING:
    from app.client.results import Alias

app = typer.Typer()
alias_app = typer.Typer(no_args_is_help=True, help="Movable names of versions.")
app.add_typer(alias_app, name="alias")

ROUNDING = 1e-6  # of shares that are written as decimals
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")

Name = Annotated[str, typer.Argument(metavar="ALIAS", help="Name of the alias")]
Etag = Annotated[
    str | None, typer.Option("--if-match", help="Only if this is its etag; default: the one it has when we look")
]


@alias_app.command("show", epilog="Example: softprompt alias show sentiment_mixed")
def show_aliases(
    task: TaskName,
    name: Annotated[str | None, typer.Argument(metavar="ALIAS", help="This one alone")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """What a task's aliases stand for, and their etags."""
    with connect(url, api_key) as client:
        names = [name] if name is not None else list(client.task(task).aliases)
        found = [client.alias(task, each) for each in names]
    if as_json:
        write_json(_document(found[0]) if name is not None else [_document(alias) for alias in found])
    else:
        write_table(("alias", "versions", "etag"), ((alias.alias, _target(alias), alias.etag) for alias in found))


@alias_app.command(
    "set", epilog="Examples: softprompt alias set mood prod 8; softprompt alias set mood prod 7=0.9 8=0.1"
)
def set_alias(
    task: TaskName,
    name: Name,
    target: Annotated[
        list[str],
        typer.Argument(metavar="VERSION", help="A version; or several with their shares, which sum to 1: 7=0.9 8=0.1"),
    ],
    if_match: Etag = None,
    new: Annotated[bool, typer.Option("--new", help="Only if there is no such alias yet")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias at a version, or split it among several: a canary.

    Fails with exit code 5 if somebody moves it in between.
    """
    if new and if_match is not None:
        raise typer.BadParameter("a new alias has no etag yet: give one of --new and --if-match", param_hint="--new")
    version, weights = _parse_target(target)
    with connect(url, api_key) as client:
        from app.client import NotFound

        etag = if_match
        if etag is None and not new:
            try:
                etag = client.alias(task, name).etag
            except NotFound:
                etag = None  # whether the task is there the write will say
        moved = client.set_alias(task, name, version=version, weights=weights, etag=etag)
    _tell(moved, as_json=as_json)


@alias_app.command("remove", epilog="Example: softprompt alias remove mood staging")
def remove_alias(
    task: TaskName,
    name: Name,
    if_match: Etag = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Remove an alias; the versions that it names stay."""
    with connect(url, api_key) as client:
        deleted = client.remove_alias(task, name, etag=if_match or client.alias(task, name).etag)
    if as_json:
        write_json(deleted.model_dump(exclude_unset=True))
    else:
        say(f"{deleted.id} is removed")


@app.command(epilog="Example: softprompt rollback mood prod")
def rollback(
    task: TaskName,
    name: Annotated[str, typer.Argument(metavar="ALIAS", help="Name of the alias")] = "latest",
    if_match: Etag = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Undo an alias's last move; again, the one before it."""
    with connect(url, api_key) as client:
        moved = client.roll_back(task, name, etag=if_match or client.alias(task, name).etag)
    _tell(moved, as_json=as_json)


def _parse_target(target: list[str]) -> tuple[int | None, dict[int, float] | None]:
    """The server takes weights of any sum. Here they are shares: `8=0.1` alone would move everybody to 8."""
    weights: dict[int, float] = {}
    for text in target:
        number, mark, share = text.partition("=")
        try:
            if not _NUMBER.fullmatch(number) or int(number) in weights or (not mark and len(target) > 1):
                raise ValueError
            weights[int(number)] = float(share) if mark else 1.0
            if not 0 < weights[int(number)] <= 1:
                raise ValueError
        except ValueError:
            raise typer.BadParameter(f"{text!r}: one version, or each one once with its share, 7=0.9 8=0.1") from None
    total = math.fsum(weights.values())
    if abs(total - 1) > ROUNDING:
        raise typer.BadParameter(f"the shares sum to {total:g}, not to 1: say what each version gets, 7=0.9 8=0.1")
    if len(weights) == 1:
        return next(iter(weights)), None
    return None, weights


def _tell(alias: Alias, *, as_json: bool) -> None:
    if as_json:
        write_json(_document(alias))
    else:
        say(f"{alias.task}@{alias.alias} is {_target(alias)}")


def _document(alias: Alias) -> dict[str, object]:
    return alias.model_dump(exclude_none=True)


def _target(alias: Alias) -> str:
    if not alias.weights:
        return str(alias.version)
    return " ".join(f"{version}={share:g}" for version, share in alias.weights.items())
