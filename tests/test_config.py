"""Settings from the environment and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.config import SECRETS, Settings, variables
from app.errors import InvalidSettings


def test_defaults() -> None:
    settings = Settings.load()
    assert (settings.model, settings.host, settings.port) == ("smollm2-135m-instruct", "127.0.0.1", 8000)
    assert settings.registry == Path("prompts")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_MODEL", "/models/mine")
    monkeypatch.setenv("SOFTPROMPT_MAX_NUM_SEQS", "7")
    monkeypatch.setenv("SOFTPROMPT_THREADS", "")
    settings = Settings.load()
    assert (settings.model, settings.max_num_seqs, settings.threads) == ("/models/mine", 7, None)


def test_every_field_can_be_set_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"device": "cuda:1", "dtype": "float16", "quantization": "int8", "log_level": "debug", "insecure": "True"}
    values["url"] = "https://prompts.example/api"
    values |= dict.fromkeys(SECRETS, "0123456789abcdef")
    for variable, field in variables().items():
        monkeypatch.setenv(variable, values.get(field, "12345"))
    settings = Settings.load()
    for field in Settings.model_fields:
        value = getattr(settings, field)
        if field in SECRETS:
            value = value.get_secret_value()
        elif isinstance(value, tuple):
            (value,) = value
        assert str(value).removesuffix(".0") == values.get(field, "12345"), field


def test_lists_are_comma_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_CORS_ORIGINS", "https://a.example, https://b.example:8443,")
    assert Settings.load().cors_origins == ("https://a.example", "https://b.example:8443")


@pytest.mark.parametrize("key", ["short-secret", "with a blank in it, and long", "ключ-ключ-ключ-ключ", "k" * 501])
def test_secrets_are_never_repeated(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("SOFTPROMPT_API_KEY", key)
    with pytest.raises(InvalidSettings) as caught:
        Settings.load()
    assert caught.value.message.startswith("SOFTPROMPT_API_KEY is set: ") and key not in caught.value.message
    monkeypatch.setenv("SOFTPROMPT_API_KEY", "sk-very-secret-indeed")
    monkeypatch.setenv("SOFTPROMPT_DATABASE", "postgresql+psycopg://me:sesame@db/keys")
    shown = repr(Settings.load())
    assert "secret-indeed" not in shown and "sesame" not in shown


def test_port_variables_and_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "9001")
    assert Settings.load().port == 9001
    monkeypatch.setenv("SOFTPROMPT_PORT", "9002")
    assert Settings.load().port == 9002
    assert Settings.load(port=9003).port == 9003
    assert Settings.load(port=None).port == 9002


def test_one_line_per_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "-1")
    monkeypatch.setenv("SOFTPROMPT_DTYPE", "int3")
    monkeypatch.setenv("SOFTPROMPT_MAX_SEQS", "4")
    with pytest.raises(InvalidSettings) as caught:
        Settings.load(max_waiting=-5)
    assert sorted(caught.value.message.splitlines()) == [
        "PORT is '-1': input should be greater than or equal to 0",
        "SOFTPROMPT_DTYPE is 'int3': input should be 'auto', 'float32', 'bfloat16' or 'float16'",
        "SOFTPROMPT_MAX_SEQS is not a setting; did you mean SOFTPROMPT_MAX_NUM_SEQS?",
        "max_waiting is -5: input should be greater than or equal to 0",
    ]


def test_a_misspelt_variable_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_REGISTERY", "/data")
    with pytest.raises(InvalidSettings, match="did you mean SOFTPROMPT_REGISTRY"):
        Settings.load()


def test_a_misspelt_option_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="prot is not a setting; did you mean port"):
        Settings.load(prot=1)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "meta"])
def test_device_names(device: str) -> None:
    with pytest.raises(InvalidSettings, match="device is"):
        Settings.load(device=device)


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings.load().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("xdg", "expected"),
    [("/var/c", "/var/c/softprompt"), ("rel", "/h/.cache/softprompt"), ("", "/h/.cache/softprompt")],
)
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, xdg: str, expected: str) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert Settings.load().cache_dir == Path(expected)
    assert Settings.load(cache_dir=Path("~/here")).cache_dir == Path("/h/here")
