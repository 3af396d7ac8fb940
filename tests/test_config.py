"""Settings from the environment and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from app.cli import main
from app.config import SECRETS, Settings, load_with_sources, variables
from app.errors import InvalidSettings
from app.setting_sources import MAX_FILE_BYTES


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
    values |= {"max_training_jobs": "7", "training_nice": "7"}
    values |= {"log_format": "json", "log_prompts": "True", "metrics_compat": "vllm", "otlp_endpoint": "http://c:4318"}
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


# -- .env ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The .env file of the working directory, not written yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("app.setting_sources.ENV_FILE", Path(".env"))
    return tmp_path / ".env"


def test_an_option_wins_over_the_environment_over_dotenv_over_the_default(
    dotenv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dotenv.write_text("SOFTPROMPT_MAX_WAITING=1\nSOFTPROMPT_MAX_NUM_SEQS=2\nsoftprompt_threads=3\nSOFTPROMPT_HOST=\n")
    monkeypatch.setenv("SOFTPROMPT_MAX_WAITING", "11")
    monkeypatch.setenv("SOFTPROMPT_MAX_NUM_SEQS", "12")
    settings, sources = load_with_sources(max_waiting=21)
    assert (settings.max_waiting, settings.max_num_seqs, settings.threads) == (21, 12, 3)
    assert (settings.host, settings.audit_rows) == ("127.0.0.1", 100_000)
    kinds = [sources[name].kind for name in ("max_waiting", "max_num_seqs", "threads", "host", "audit_rows")]
    assert kinds == ["option", "environment", ".env", "default", "default"]
    monkeypatch.setenv("SOFTPROMPT_MAX_NUM_SEQS", "")
    assert Settings.load().max_num_seqs == 2, "an empty variable is none"


def test_either_name_of_the_port_in_the_environment_wins_over_both_in_dotenv(
    dotenv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dotenv.write_text("PORT=9001\n")
    assert Settings.load().port == 9001
    dotenv.write_text("PORT=9001\nSOFTPROMPT_PORT=9002\n")
    assert Settings.load().port == 9002
    monkeypatch.setenv("PORT", "9003")
    assert Settings.load().port == 9003


def test_what_belongs_to_other_programs_is_left_alone(dotenv: Path) -> None:
    dotenv.write_text(
        "# theirs and ours\nexport DATABASE_URL='postgres://me:pw@db/x'\nHOST=0.0.0.0\nMODEL=other\nEMPTY\n"
        'SOFTPROMPT_MODEL="/models/$HOME/mine"  # not expanded\nSOFTPROMPT_CORS_ORIGINS=https://a.example,https://b.example\n'
    )
    settings = Settings.load()
    assert (settings.model, settings.host, settings.database) == ("/models/$HOME/mine", "127.0.0.1", None)
    assert settings.cors_origins == ("https://a.example", "https://b.example")


def test_what_is_wrong_in_dotenv_is_said_without_repeating_it(dotenv: Path) -> None:
    dotenv.write_text(
        "SOFTPROMPT_MODLE=x\nSOFTPROMPT_PORT=-1\nsesame, ouvre-toi\nSOFTPROMPT_THREADS\n"
        "SOFTPROMPT_API_KEY='sesame ouvre'\n"
    )
    with pytest.raises(InvalidSettings) as caught:
        Settings.load()
    assert sorted(caught.value.message.splitlines()) == [
        ".env, line 3: not NAME=value",
        ".env, line 4: SOFTPROMPT_THREADS has no value",
        "SOFTPROMPT_API_KEY in .env is set: value error, 16 to 500 characters, printable ASCII without spaces",
        "SOFTPROMPT_MODLE in .env is not a setting; did you mean SOFTPROMPT_MODEL?",
        "SOFTPROMPT_PORT in .env is '-1': input should be greater than or equal to 0",
    ]


@pytest.mark.parametrize("content", [b"SOFTPROMPT_MODEL=\xff", b"#" * (MAX_FILE_BYTES + 1), None])
def test_a_dotenv_that_cannot_be_read_is_refused(dotenv: Path, content: bytes | None) -> None:
    if content is None:
        dotenv.mkdir()
    else:
        dotenv.write_bytes(content)
    with pytest.raises(InvalidSettings, match=r"^\.env: the file "):
        Settings.load()


def test_importing_reads_nothing(dotenv: Path) -> None:
    dotenv.mkdir()
    script = "import app.config, app.cli; print('fine')"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=dotenv.parent, env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.stdout == "fine\n", done.stderr


# -- secrets in files ----------------------------------------------------------------------------------------------

SECRET = "sk-0123456789abcdef"


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
@pytest.mark.parametrize("where", ["environment", ".env"])
def test_a_secret_from_a_file(dotenv: Path, monkeypatch: pytest.MonkeyPatch, ending: str, where: str) -> None:
    path = dotenv.parent / "key"
    path.write_bytes((SECRET + ending).encode())
    if where == ".env":
        dotenv.write_text(f"SOFTPROMPT_API_KEY_FILE={path}\n")
    else:
        monkeypatch.setenv("SOFTPROMPT_API_KEY_FILE", str(path))
    settings, sources = load_with_sources()
    assert settings.api_key is not None and settings.api_key.get_secret_value() == SECRET
    assert (sources["api_key"].kind, sources["api_key"].name) == ("file", "SOFTPROMPT_API_KEY_FILE")


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_and_its_file_exclude_each_other(dotenv: Path, monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    variable = f"SOFTPROMPT_{secret.upper()}"
    dotenv.write_text(f"{variable}_FILE=/run/secrets/x\n")
    monkeypatch.setenv(variable, SECRET)
    with pytest.raises(InvalidSettings) as caught:
        Settings.load()
    assert caught.value.message == f"{variable} and {variable}_FILE are both set: keep one of them"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "the file cannot be read (No such file or directory)"),
        (b"", "the file is empty"),
        (b"\r\n\n", "the file is empty"),
        (b"\xff\xfe", "the file is not UTF-8"),
        (b"x" * (MAX_FILE_BYTES + 1), f"the file is larger than {MAX_FILE_BYTES} bytes"),
    ],
)
def test_files_of_secrets_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, says: str
) -> None:
    path = tmp_path / SECRET
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("SOFTPROMPT_API_KEY_FILE", str(path))
    with pytest.raises(InvalidSettings) as caught:
        Settings.load()
    assert caught.value.message == f"SOFTPROMPT_API_KEY_FILE: {says}", "the path may be the secret itself"
    monkeypatch.delenv("SOFTPROMPT_API_KEY_FILE")
    monkeypatch.setenv("SOFTPROMPT_API_KEY_FIEL", str(path))
    with pytest.raises(InvalidSettings, match="did you mean SOFTPROMPT_API_KEY_FILE"):
        Settings.load()


def test_print_config(dotenv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (dotenv.parent / "url").write_text("sqlite:///sesame.db\n")
    dotenv.write_text("SOFTPROMPT_DATABASE_FILE=url\nSOFTPROMPT_MAX_WAITING=7\n")
    monkeypatch.setenv("SOFTPROMPT_API_KEY", SECRET)
    arguments = ["serve", "--port", "9009", "--print-config"]
    plain = CliRunner().invoke(main.app, arguments, catch_exceptions=False)
    as_json = CliRunner().invoke(main.app, [*arguments, "--json"], catch_exceptions=False)
    found = json.loads(as_json.stdout)
    assert list(found) == list(Settings.model_fields)
    assert found["port"] == {"value": 9009, "source": "option", "name": "port"}
    assert found["max_waiting"] == {"value": 7, "source": ".env", "name": "SOFTPROMPT_MAX_WAITING"}
    assert found["api_key"] == {"value": "**********", "source": "environment", "name": "SOFTPROMPT_API_KEY"}
    assert found["database"] == {"value": "**********", "source": "file", "name": "SOFTPROMPT_DATABASE_FILE"}
    assert found["threads"] == {"value": None, "source": "default", "name": None}
    for output in (plain.stdout, as_json.stdout):
        assert SECRET not in output and "sesame" not in output
    assert all(name in plain.stdout for name in Settings.model_fields)


def test_passwords_in_urls_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_URL", "http://me:sesame@host:81")
    monkeypatch.setenv("SOFTPROMPT_CORS_ORIGINS", "http://a:sesame@b, http://c")
    for arguments in (["--json"], []):
        shown = CliRunner().invoke(main.app, ["serve", "--print-config", *arguments], catch_exceptions=False).stdout
        assert "http://***@host:81" in shown and "http://***@b" in shown and "sesame" not in shown
    monkeypatch.setenv("SOFTPROMPT_OTLP_ENDPOINT", "http://me:sesame@collector")
    monkeypatch.setenv("SOFTPROMPT_PORT", "http://me:sesame@host")
    for url in ("me:sesame@host", "http://me:sesame@host:port", "http://me:sesame@[host"):
        monkeypatch.setenv("SOFTPROMPT_URL", url)
        with pytest.raises(InvalidSettings) as caught:
            Settings.load()
        assert caught.value.message.count("***@") == 3 and "sesame" not in caught.value.message
