"""`softprompt doctor` on a tiny base, and on installations that are broken in every way it looks for."""

from __future__ import annotations

import importlib.metadata
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app import doctor
from app.access import Database, KeyStore
from app.checkpoint import TENSORS_FILE, read_checkpoint
from app.cli import main
from app.config import Settings
from app.engine.native.build import NativeUnavailable
from app.manifest import ManifestInput
from app.registry import Registry, Store
from tests.api_harness import files
from tests.tiny import save_tiny, tiny_base

SECRET = "sk-0123456789abcdef-sesame"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Without a model, a compiler or anything on the network; a free port."""
    monkeypatch.setenv("SOFTPROMPT_REGISTRY", str(tmp_path / "prompts"))
    monkeypatch.setenv("SOFTPROMPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SOFTPROMPT_PORT", "0")
    monkeypatch.setenv("CC", "/nonexistent/cc")
    return tmp_path


def examined(status: int) -> dict[str, list[dict[str, str]]]:
    """The checks by name; also run for people, without a traceback."""
    result = CliRunner().invoke(main.app, ["doctor", "--json"], catch_exceptions=False)
    assert result.exit_code == status, result.stdout
    assert SECRET not in result.stdout and "sesame" not in result.stdout
    reply = json.loads(result.stdout.splitlines()[-1])
    assert reply["status"] == ("failed" if status else reply["status"])
    found: dict[str, list[dict[str, str]]] = {}
    for check in reply["checks"]:
        assert check["status"] in ("ok", "warning", "failed") and check["found"].isprintable()
        found.setdefault(check["name"], []).append(check)
    return found


def publish(home: Path) -> Registry:
    info = tiny_base("llama").info
    registry = Registry(Store(home / "prompts"), info)
    given = files()
    registry.publish("mood", read_checkpoint(given["adapter_config"], given["adapter_model"], ManifestInput(), info))
    return registry


def test_a_whole_installation(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(home / "tiny-llama", "llama")
    publish(home)
    monkeypatch.setenv("SOFTPROMPT_MODEL", str(home / "tiny-llama"))
    monkeypatch.setenv("SOFTPROMPT_API_KEY", SECRET)
    found = examined(0)
    statuses = {name: checks[-1]["status"] for name, checks in found.items()}
    assert statuses.pop("native decoder") == "warning", "there is no compiler"
    statuses.pop("memory"), statuses.pop("disk")
    assert set(statuses.values()) == {"ok"}, found
    assert "transformers' own forward" in found["parity"][0]["found"]
    assert "32 tokens behind mood:1" in found["generation"][0]["found"]
    assert "1 tasks, 1 versions" in found["registry"][0]["found"]
    assert "api_key" in found["settings"][0]["found"]


def test_without_a_model_nothing_is_fetched_and_everything_else_is_told(home: Path) -> None:
    found = examined(0)
    assert found["model"][0]["status"] == "warning" and "softprompt model pull" in found["model"][0]["advice"]
    assert "parity" not in found and not (home / "cache").exists() and not (home / "prompts").exists()
    native = found["native decoder"][0]
    assert native["status"] == "warning" and "/nonexistent/cc" in native["found"] and "gcc" in native["advice"]


def test_bad_settings_are_told_and_the_rest_goes_by_the_defaults(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr(doctor, "_model", lambda _: iter(()))
    monkeypatch.setattr(doctor, "_native", lambda _: iter(()))
    monkeypatch.setenv("SOFTPROMPT_MODLE", "x")
    monkeypatch.setenv("SOFTPROMPT_API_KEY", "sesame")
    [check] = examined(1)["settings"]
    assert check["status"] == "failed" and "did you mean SOFTPROMPT_MODEL?" in check["found"]


@pytest.mark.parametrize("damaged", ["file", "log"])
def test_damage_in_the_registry(home: Path, damaged: str) -> None:
    publish(home)
    task = home / "prompts" / "mood"
    path = task / "versions" / "1" / TENSORS_FILE if damaged == "file" else task / "log" / "00000001.json"
    path.write_bytes(path.read_bytes()[:-9])
    checks = examined(0)["registry"]
    [warning] = [check for check in checks if check["status"] == "warning"]
    assert ("mood:1" if damaged == "file" else "log") in warning["found"] and warning["advice"]


def test_a_port_in_use_and_keys_that_are_away(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("SOFTPROMPT_PORT", str(other.getsockname()[1]))
        monkeypatch.setenv("SOFTPROMPT_DATABASE", f"sqlite:///{home}/sesame.db/keys.db")
        (home / "sesame.db").write_bytes(b"")
        found = examined(0)
        assert found["port"][0]["status"] == "warning" and "SOFTPROMPT_PORT" in found["port"][0]["advice"]
    monkeypatch.setenv("SOFTPROMPT_DATABASE", f"nosuch://{SECRET}@host/keys")
    assert examined(1)["keys"][0]["status"] == "failed"
    monkeypatch.delenv("SOFTPROMPT_DATABASE")
    monkeypatch.setenv("SOFTPROMPT_HOST", "0.0.0.0")
    for there in (False, True):  # a database in which there is no key is none
        if there:
            Database.of(Settings.load()).prepare()
        [check] = examined(1)["keys"]
        assert check["status"] == "failed" and "there is no key" in check["found"]
    monkeypatch.setenv("SOFTPROMPT_INSECURE", "1")
    assert [check["status"] for check in examined(0)["keys"]] == ["warning"]
    monkeypatch.delenv("SOFTPROMPT_INSECURE")
    KeyStore(Database.of(Settings.load())).create("k", scopes=["generate"])
    assert [check["status"] for check in examined(0)["keys"]] == ["ok"]


def test_an_answer_of_any_length(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(home / "tiny-llama", "llama")
    monkeypatch.setenv("SOFTPROMPT_MODEL", str(home / "tiny-llama"))
    for tokens in (1, 2):
        monkeypatch.setattr(doctor, "NEW_TOKENS", tokens)
        assert f"{tokens} tokens behind no prompt, " in examined(0)["generation"][0]["found"]
    assert not (home / "prompts").exists(), "to look is not to make"


@pytest.mark.usefixtures("home")
def test_what_nobody_foresaw_is_one_line_without_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Any:
        raise ZeroDivisionError(SECRET)

    monkeypatch.setattr(doctor, "_device", broken)
    monkeypatch.setattr(doctor, "_registry", broken)
    found = examined(1)
    assert found["device"][0]["found"] == "ZeroDivisionError while looking" and found["port"][0]["status"] == "ok"
    plain = CliRunner().invoke(main.app, ["doctor"], catch_exceptions=False)
    assert plain.exit_code == 1 and "Traceback" not in plain.output and SECRET not in plain.output


@pytest.mark.usefixtures("home")
def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def missing(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    assert "missing: peft" in examined(1)["packages"][-1]["found"]


@pytest.mark.usefixtures("home")
def test_unprintable_names_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "app.engine.native.build.load_kernel",
        lambda _: (_ for _ in ()).throw(NativeUnavailable("\x1b[31mred\n[bold]")),
    )
    result = CliRunner().invoke(main.app, ["doctor"], catch_exceptions=False)
    assert "\x1b[31mred" not in result.output and "\\x1b[31mred\\n[bold]" in result.output
