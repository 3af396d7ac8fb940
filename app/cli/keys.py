"""`softprompt keys`: who may use a server that is open to others."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.output import AsJson, err, write, write_json, write_table
from app.config import Settings
from app.errors import InvalidRequest, ReferenceNotFound

if TYPE_CHECKING:
    from app.access import Database, Key

app = typer.Typer(no_args_is_help=True, help="Keys of the HTTP API.")
_DURATION = re.compile(r"([1-9][0-9]{0,8})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@app.command(epilog="Example: softprompt keys create alice --scope generate --task 'support-*' --rpm 600 --expires 30d")
def create(
    name: Annotated[str, typer.Argument(help="What you call it")],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="generate, prompts:read, prompts:write, aliases:write, jobs, metrics or admin (all); default: generate"
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of the tasks it may know of, e.g. 'support-*', and of the base model; default: all"),
    ] = None,
    rpm: Annotated[int | None, typer.Option(help="Requests a minute")] = None,
    tpm: Annotated[int | None, typer.Option(help="Tokens a minute")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(help="Tokens a day (UTC)")] = None,
    max_parallel: Annotated[int | None, typer.Option(help="Requests at once")] = None,
    expires: Annotated[str | None, typer.Option(help="How long it is valid: 12h, 30d, ...; default: for ever")] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Keys of one tenant share cached text; default: of its own")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. Its secret is shown once: only its hash is kept."""
    from app.access import KeyStore, Limits

    database = _database()
    database.prepare()
    key, secret = KeyStore(database).create(
        name,
        scopes=scope or ["generate"],  # type: ignore[arg-type]  # it checks them
        tasks=task or None,
        tenant=tenant,
        limits=Limits(rpm, tpm, tokens_per_day, max_parallel),
        expires_in=None if expires is None else _seconds(expires),
    )
    _note(database, "create_key", key.id)
    if as_json:
        write_json({**_shown(key), "secret": secret})
    else:
        err.print(f"{key.id} ({', '.join(sorted(key.scopes))}). The secret is shown this once:")
        write(secret)


@app.command("list", epilog="Example: softprompt keys list")
def list_keys(as_json: AsJson = False) -> None:
    """Keys by age, with what they used today."""
    from app.access import KeyStore
    from app.access.usage import DAY, read_usage

    database = _database()
    keys: list[Key] = []
    used: dict[str, int] = {}
    if database.exists:
        database.prepare()
        keys = KeyStore(database).all()
        with database.reading() as connection:
            used = read_usage(connection, int(time.time() // DAY))
    rows = [{**_shown(key), "tokens_today": used.get(key.id, 0)} for key in keys]
    if as_json:
        write_json(rows)
        return
    write_table(
        ("id", "name", "secret", "scopes", "tasks", "state", "last used", "tokens today"),
        (
            (
                *(key.id, key.name, f"{key.prefix}...", " ".join(row["scopes"])),
                "all" if key.tasks is None else " ".join(key.tasks),
                *(_state(key), row["last_used_at"] or "never", row["tokens_today"]),
            )
            for key, row in zip(keys, rows, strict=True)
        ),
    )


@app.command(epilog="Example: softprompt keys revoke key_...")
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID", help="key_...")], as_json: AsJson = False) -> None:
    """Revoke a key, at once and for ever. Running servers know within two seconds."""
    from app.access import KeyStore

    database = _database()
    if database.exists:
        database.prepare()
    if not database.exists or not KeyStore(database).revoke(key_id):
        raise ReferenceNotFound("there is no key of this id", param="ID")
    _note(database, "revoke_key", key_id)
    if as_json:
        write_json({"id": key_id, "revoked": True})
    else:
        err.print(f"{key_id} is revoked")


@app.command(epilog="Example: softprompt keys audit --limit 20")
def audit(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="So many of the newest entries")] = 100,
    as_json: AsJson = False,
) -> None:
    """Who changed what, and who was refused, the newest first."""
    from app.access.audit import read_audit

    database = _database()
    if database.exists:
        database.prepare()
    entries = read_audit(database, limit=limit) if database.exists else []
    rows = [{**vars(entry), "time": _iso(entry.time)} for entry in entries]
    if as_json:
        write_json(rows)
        return
    columns = ("time", "key_id", "action", "target", "status", "request_id")
    write_table(
        ("time", "key", "action", "target", "status", "request"), ([row[name] for name in columns] for row in rows)
    )


def _database() -> Database:
    from app.access import Database

    return Database.of(Settings.load())


def _note(database: Database, action: str, target: str) -> None:
    from app.access import AuditEntry
    from app.access.audit import write_audit

    entry = AuditEntry.now(request_id="cli", key_id="cli", action=action, target=target, status=200)
    write_audit(database, [entry], keep=Settings.load().audit_rows)


def _seconds(text: str) -> int:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise InvalidRequest("expires: a number and a unit, such as 12h, 30d or 8w", param="expires")
    return int(match[1]) * _SECONDS[match[2]]


def _shown(key: Key) -> dict[str, Any]:
    """Everything but the hash."""
    shown = {name: value for name, value in vars(key).items() if name not in ("hash", "limits")}
    times = {name: _iso(shown[name]) for name in ("created_at", "expires_at", "revoked_at", "last_used_at")}
    return {**shown, **vars(key.limits), **times, "scopes": sorted(key.scopes)}


def _state(key: Key) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if not key.is_valid(time.time()):
        return "expired"
    return "valid" if key.expires_at is None else f"valid until {_iso(key.expires_at)}"


def _iso(seconds: int | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
