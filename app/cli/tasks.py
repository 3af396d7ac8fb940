"""`softprompt list`, `show`, `push`, `pull`, `rm`, `restore`, `history` and `inspect`: what a server has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.output import AsJson, say, warn, write, write_facts, write_json, write_table
from app.cli.server import ApiKey, Reference, TaskName, Url, complete_reference, connect

if TYPE_CHECKING:
    from app.client.results import Change, Task, VirtualToken

app = typer.Typer()


@app.command("list", epilog="Example: softprompt list; softprompt list sentiment_mixed --deleted")
def list_tasks(
    task: Annotated[str | None, typer.Argument(help="List its versions", autocompletion=complete_reference)] = None,
    tag: Annotated[str | None, typer.Option(help="Only what has it: key or key=value")] = None,
    deleted: Annotated[bool, typer.Option("--deleted", help="Deleted versions that can be restored")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List the tasks, or the versions of one."""
    if task is None and deleted:
        raise typer.BadParameter("needs a task", param_hint="--deleted")
    with connect(url, api_key) as client:
        if task is None:
            tasks = list(client.tasks(tag=tag))
            if as_json:
                write_json([found.model_dump(exclude_unset=True) for found in tasks])
            else:
                write_table(("task", "versions", "newest", "aliases"), map(_task_row, tasks))
            return
        versions = list(client.versions(task, tag=tag, deleted=deleted))
    if as_json:
        write_json([version.model_dump(exclude_unset=True) for version in versions])
        return
    write_table(
        ("version", "aliases", "type", "virtual tokens", "created", "description"),
        (
            (
                version.reference,
                " ".join(version.aliases),
                *(version.peft_type, version.num_virtual_tokens, version.created_at[:19], version.description[:60]),
            )
            for version in versions
        ),
    )


@app.command(epilog="Example: softprompt show sentiment_mixed@prod")
def show(reference: Reference, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show a version and its manifest."""
    with connect(url, api_key) as client:
        version = client.version(reference)
    if as_json:
        write_json(version.model_dump(exclude_unset=True))
        return
    facts = version.model_dump(exclude_none=True, exclude={"task", "version", "object"})
    facts["defaults"] = {name: value for name, value in version.defaults.items() if value is not None}
    shown = {name: value for name, value in facts.items() if value not in ({}, [], "")}
    write_facts({name: value if isinstance(value, str) else json.dumps(value) for name, value in shown.items()})


@app.command(epilog="Example: softprompt push mood out/mood --alias staging")
def push(
    task: TaskName,
    folder: Annotated[Path, typer.Argument(help="What PEFT's save_pretrained wrote; a manifest.json in it counts")],
    alias: Annotated[str, typer.Option(help="Alias to move to the new version; empty: none")] = "latest",
    manifest: Annotated[Path | None, typer.Option(help="manifest.json to send instead")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Upload a PEFT folder as a new version, served at once."""
    with connect(url, api_key) as client:
        found = client.push(task, folder, alias=alias or None, manifest=manifest)
    if as_json:
        write_json(found.model_dump(exclude_unset=True))
        return
    for warning in found.warnings:
        warn(warning)
    verb = "published" if found.created else "was published before as"
    write(f"{verb} {found.reference}  {found.digest}")


@app.command(epilog="Example: softprompt pull sentiment_mixed@prod out/sentiment")
def pull(
    reference: Reference,
    folder: Annotated[Path, typer.Argument(help="Folder to write; new or empty")],
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Download a version as the PEFT folder that it came from, whole or not at all."""
    with connect(url, api_key) as client:
        found = client.pull(reference, folder)
    if as_json:
        write_json({"reference": found.reference, "digest": found.digest, "folder": str(folder)})
    else:
        write(f"{found.reference}  {found.digest}  {folder}")


@app.command(epilog="Example: softprompt rm mood:3 --yes")
def rm(
    name: Annotated[
        str, typer.Argument(help="task:7, or a task with all its versions", autocompletion=complete_reference)
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Delete a version, or a task, that no alias names; it can be restored for a while."""
    task, version = _task_and_version(name, needed=False)
    if not yes:
        what = f"the task {task} with all its versions" if version is None else f"{task}:{version}"
        typer.confirm(f"Delete {what}?", abort=True, err=True)
    with connect(url, api_key) as client:
        deleted = client.delete_task(task) if version is None else client.delete_version(task, version)
    if as_json:
        write_json(deleted.model_dump(exclude_unset=True))
    else:
        say(f"{deleted.id} is deleted")


@app.command(epilog="Example: softprompt restore mood:3")
def restore(
    version: Annotated[str, typer.Argument(help="task:7; `softprompt list TASK --deleted` has them")],
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Undo the deletion of a version. It gets no alias back."""
    task, number = _task_and_version(version, needed=True)
    with connect(url, api_key) as client:
        found = client.restore(task, number or 0)
    if as_json:
        write_json(found.model_dump(exclude_unset=True))
    else:
        say(f"{found.reference} is back")


@app.command(epilog="Example: softprompt history sentiment_mixed --limit 20")
def history(
    task: TaskName,
    limit: Annotated[int, typer.Option(min=1, help="So many of the newest changes")] = 100,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Who changed what in a task, the newest first."""
    from itertools import islice

    with connect(url, api_key) as client:
        changes = list(islice(client.history(task, page=min(limit, 1_000)), limit))
    if as_json:
        write_json([change.model_dump(exclude_unset=True) for change in changes])
    else:
        write_table(("change", "time", "who", "what", "alias", "version"), map(_change_row, changes))


@app.command(epilog="Example: softprompt inspect sentiment_mixed --neighbors 3")
def inspect(
    reference: Reference,
    neighbors: Annotated[int, typer.Option(min=1, max=50, help="Near words of each virtual token")] = 5,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """What a version's virtual tokens are near to, how long they are, and which tasks are alike."""
    with connect(url, api_key) as client:
        found = client.inspect(reference, neighbors=neighbors)
    if as_json:
        write_json(found.model_dump(exclude_unset=True))
        return
    norms = ("norm",) if found.kind == "embedding" else ("key norm", "value norm")
    write_table(("virtual token", *norms, "near"), map(_virtual_row, found.virtual_tokens))
    if found.similar:
        write("")
        write_table(("alike", "similarity"), ((other.reference, f"{other.similarity:.3f}") for other in found.similar))


def _task_and_version(text: str, *, needed: bool) -> tuple[str, int | None]:
    """Of `task:7` or, unless the version is needed, `task`. What an alias names is not deleted by that name."""
    task, mark, number = text.partition(":")
    if not task or "@" in text or (mark or needed) and not (number.isascii() and number.isdecimal()):
        raise typer.BadParameter(f"{text!r} is not task:7" + (" or a task's name" if not needed else ""))
    return task, int(number) if mark else None


def _task_row(task: Task) -> tuple[Any, ...]:
    aliases = " ".join(f"{name}={version}" for name, version in task.aliases.items())
    return task.task, len(task.versions), max(task.versions, default=None), aliases


def _change_row(change: Change) -> tuple[Any, ...]:
    split = change.weights and " ".join(f"{version}={share:g}" for version, share in change.weights.items())
    return change.seq, change.time[:19], change.actor, change.op, change.alias, split or change.version


def _virtual_row(token: VirtualToken) -> tuple[Any, ...]:
    norms = (token.norm,) if token.norm is not None else (token.key_norm or 0.0, token.value_norm or 0.0)
    near = " ".join(
        f"{json.dumps(word.text, ensure_ascii=False)} {word.similarity:.2f}" for word in token.nearest or ()
    )
    return token.index, *(f"{norm:.3f}" for norm in norms), near
