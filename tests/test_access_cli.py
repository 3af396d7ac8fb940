"""`softprompt keys`, as an operator types it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from app.access import Access, AuditEntry, Database, KeyStore, Limits
from app.access.audit import write_audit
from app.cli import main
from app.config import Settings
from app.errors import ReferenceNotFound

runner = CliRunner()


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOFTPROMPT_REGISTRY", str(tmp_path / "prompts"))
    return tmp_path / "prompts"


def invoke(*arguments: str) -> Result:
    return runner.invoke(main.app, ["keys", *arguments], catch_exceptions=False)


def read(*arguments: str) -> Any:
    return json.loads(invoke(*arguments, "--json").stdout)


def test_before_the_first_key(registry: Path) -> None:
    assert read("list") == [] and read("audit") == []
    with pytest.raises(ReferenceNotFound, match="no key of this id"):
        invoke("revoke", "key_1")
    assert not registry.exists()


def test_a_key_from_its_making_to_its_end(registry: Path) -> None:
    limits = ("--rpm", "600", "--tpm", "5000", "--tokens-per-day", "100000", "--max-parallel", "8")
    made = read(
        *("create", "alice", "--scope", "generate", "--scope", "prompts:read", "--task", "support-*", "--task", "x"),
        *(*limits, "--expires", "30d", "--tenant", "acme"),
    )
    (key,) = KeyStore(Database.of(Settings(registry=registry))).all()
    assert key.scopes == {"generate", "prompts:read"} and key.tasks == ("support-*", "x") and key.tenant == "acme"
    assert key.limits == Limits(600, 5000, 100_000, 8)
    assert key.expires_at is not None and abs(key.expires_at - time.time() - 30 * 86_400) < 60
    secret = made["secret"]
    assert made["id"] == key.id and made["prefix"] == secret[:7] and "hash" not in made
    (listed,) = read("list")
    assert listed["id"] == key.id and listed["tokens_today"] == 0 and listed["revoked_at"] is None
    for shown in (invoke("list"), invoke("audit")):
        assert secret not in shown.output and key.hash not in shown.output and key.id in shown.output
    assert Access.open(Settings(registry=registry)).is_open is False
    assert read("revoke", key.id) == {"id": key.id, "revoked": True}
    assert read("list")[0]["revoked_at"] is not None and "revoked" in invoke("list").output
    newest, oldest = read("audit")
    assert (newest["action"], newest["target"], newest["key_id"]) == ("revoke_key", key.id, "cli")
    assert (oldest["action"], oldest["target"]) == ("create_key", key.id)
    assert read("audit", "--limit", "1") == [newest]


def test_the_secret_alone_is_on_standard_output() -> None:
    result = invoke("create", "script")
    assert result.stdout.startswith("sk-") and len(result.stdout.split()) == 1
    assert result.stdout.strip() not in result.stderr
    assert read("list")[0]["scopes"] == ["generate"]


def test_the_terminal_obeys_nothing_in_the_audit_log(registry: Path) -> None:
    """What an older version stored as it came, too."""
    database = Database.of(Settings(registry=registry))
    database.prepare()
    write_audit(database, [AuditEntry("r", "k", "delete_task", "a\x1b]0;x\x07\x1b[2J\r\u202eb", 404, 1)], keep=10)
    shown = invoke("audit").output
    assert r"a\x1b]0;x\x07\x1b[2J\r\u202eb" in shown
    assert all(character.isprintable() or character == "\n" for character in shown)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["create", "k", "--scope", "root"], 2, "scope: one or more of"),
        (["create", "k", "--expires", "soon"], 2, "a number and a unit"),
        (["create", "k", "--expires", "0d"], 2, "a number and a unit"),
        (["create", "k", "--expires", "999999999w"], 2, "hundred years"),
        (["create", "k", "--rpm", "0"], 2, "requests_per_minute"),
        (["create", ""], 2, "name"),
        (["revoke", "key_none"], 4, "no key"),
    ],
)
def test_errors_are_one_readable_line(
    arguments: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["softprompt", "keys", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main.main()
    assert exit_.value.code == code
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert read("list") == []


def test_the_database_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Path) -> None:
    monkeypatch.setenv("SOFTPROMPT_DATABASE", f"sqlite:///{tmp_path}/elsewhere.db")
    invoke("create", "k")
    assert (tmp_path / "elsewhere.db").exists() and not registry.exists()
