"""Settings: one frozen value from the command line, SOFTPROMPT_* variables and .env, refused whole if any is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.errors import InvalidSettings
from app.setting_sources import DEFAULT, PREFIX, Collected, Source, collect, nearest
from app.urls import without_password

SECRETS = ("api_key", "database")  # never repeated, not even where they are wrong
URLS = ("url", "otlp_endpoint")

Positive = Annotated[int, Field(ge=1)]
Folder = Annotated[Path, AfterValidator(Path.expanduser)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _sendable(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value()
    if not (16 <= len(text) <= 500 and text.isascii() and text.isprintable() and " " not in text):
        raise ValueError("16 to 500 characters, printable ASCII without spaces")
    return secret


def _web_address(url: str) -> str:
    try:
        found = urlsplit(url)
        found.port  # noqa: B018  # raises where it is no number
    except ValueError:  # its message may quote a password
        raise ValueError("no URL") from None
    if found.scheme not in ("http", "https") or not found.hostname:
        raise ValueError("must begin with http:// or https:// and name a host")
    return url


List = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/softprompt`, or `~/.cache/softprompt` (XDG Base Directory Specification)."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "softprompt"


class Settings(BaseSettings):
    """How a server runs. The description of each field is its documentation."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", validate_by_name=True, env_ignore_empty=True
    )

    model: str = Field(
        "smollm2-135m-instruct",
        min_length=1,
        description="Base model: the default's name, a transformers folder, a .gguf file or a hub id",
    )
    registry: Folder = Field(Path("prompts"), description="Folder of the soft prompts, one folder per task")
    cache_dir: Folder = Field(
        default_factory=default_cache_dir, description="Folder for fetched and converted base models"
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on")
    insecure: bool = Field(False, description="Listen on an address that is not loopback without any key")
    api_key: Annotated[SecretStr, AfterValidator(_sendable)] | None = Field(
        None, description="One key with every scope, beside those of `softprompt keys`; never printed"
    )
    database: SecretStr | None = Field(
        None,
        description="SQLAlchemy URL of the keys' database, e.g. postgresql+psycopg://...; default: a SQLite file in "
        "the registry's folder, made with the first key",
    )
    audit_rows: Positive = Field(100_000, description="Entries that the audit log keeps, of changes and of refusals")
    allowed_hosts: List = Field(
        (),
        description="Host headers that are answered, comma-separated, `*.example.org` and `*` too; default: on a "
        "loopback address the names of this machine for itself, else any",
    )
    cors_origins: List = Field(
        (), description="Origins whose pages may call this server, comma-separated; default: none"
    )
    port: int = Field(
        8000,
        ge=0,
        le=65_535,
        validation_alias=AliasChoices(f"{PREFIX}PORT", "PORT"),
        description="Port to listen on; 0 takes a free one. PORT works too; SOFTPROMPT_PORT wins",
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or e.g. cuda:1"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="What the model runs in; auto goes by what the device is fast at"
    )
    quantization: Literal["none", "int8"] = Field(
        "none", description="int8: the native CPU decoder with 8-bit weights, faster and a little less exact"
    )
    threads: Positive | None = Field(None, description="CPU threads for torch; default: torch's own choice")
    max_model_len: Positive | None = Field(
        None, description="Positions per request, virtual tokens included; default: the model's"
    )
    max_num_seqs: Positive = Field(64, description="Requests that run in one batch")
    max_num_batched_tokens: Positive | None = Field(
        None, description="Tokens computed in one step; default: 128 on a CPU, 2048 on a GPU"
    )
    kv_cache_tokens: Positive | None = Field(
        None, description="Capacity of the key/value cache in tokens; default: chosen by the engine"
    )
    host_cache_bytes: int = Field(
        2**30, ge=0, description="Host memory for computed keys and values of soft prompts that left the cache"
    )
    deleted_retention: float = Field(
        7 * 86_400.0, ge=0, le=1e9, description="Seconds for which a deleted version can be restored"
    )
    max_waiting: int = Field(256, ge=0, description="Requests that may wait; more are refused with 503")
    max_body_bytes: Positive = Field(2**20, description="Largest JSON body")
    max_upload_bytes: Positive = Field(64 * 2**20, le=64 * 2**20, description="Largest adapter_model.safetensors")
    training_dir: Folder | None = Field(
        None, description="Folder of training files and jobs; default: one in the registry's folder"
    )
    max_training_jobs: int = Field(1, ge=0, le=64, description="Training jobs that run at once; 0 accepts none")
    max_training_queue: Positive = Field(32, description="Training jobs that may be unfinished; more are refused")
    max_training_file_bytes: Positive = Field(64 * 2**20, le=64 * 2**20, description="Largest training file")
    max_training_bytes: Positive = Field(2**30, description="Bytes that the training files of one tenant may have")
    training_threads: Positive = Field(1, description="CPU threads of a training job")
    training_nice: int = Field(10, ge=0, le=19, description="By how much training jobs give way to other processes")
    training_memory_bytes: Positive | None = Field(
        None, description="Memory of a training job beside the mapped weights (Linux); default: no limit"
    )
    training_timeout: float = Field(86_400.0, gt=0, le=1e9, description="Seconds a training job may train in all")
    training_silence: Seconds = Field(600.0, description="Seconds without progress until a training job is restarted")
    receive_timeout: Seconds = Field(
        30.0, description="Seconds a client may take to send a request; a body gets more, at 10 kB/s"
    )
    request_timeout: Seconds = Field(
        600.0, description="Seconds until an answer is given up with 504; X-Request-Timeout may ask for less"
    )
    send_timeout: Seconds = Field(
        30.0, description="Seconds a client may take to read a part of a stream; other replies get more, at 10 kB/s"
    )
    drain_timeout: Seconds = Field(30.0, description="Seconds requests in flight get to finish at shutdown")
    url: Annotated[str, AfterValidator(_web_address)] = Field(
        "http://127.0.0.1:8000",
        description="The server that commands which need one talk to; `SOFTPROMPT_API_KEY` is their key",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least log level")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="Log lines on standard error: json or text; auto is text on a terminal, else json"
    )
    log_prompts: bool = Field(False, description="Log what the model reads of each request, too")
    metrics_compat: Literal["none", "vllm"] = Field(
        "none", description="vllm: /metrics also has what vLLM has, by its names"
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s@]+$",
        description="OpenTelemetry collector to send traces to (OTLP over HTTP), e.g. http://collector:4318; default: "
        "that of OTEL_EXPORTER_OTLP_ENDPOINT, else none",
    )

    @property
    def training_folder(self) -> Path:
        """Its dot keeps the default from being taken for a task."""
        return self.training_dir or self.registry / ".softprompt" / "training"

    @classmethod
    def load(cls, **options: Any) -> Settings:
        """Settings from options (those that are not None), the environment and a .env file; see `load_with_sources`."""
        return load_with_sources(**options)[0]


def load_with_sources(**options: Any) -> tuple[Settings, dict[str, Source]]:
    """The settings, and by field where each comes from. An option wins over the environment, that over .env.

    Raises InvalidSettings with one line per problem, an unknown SOFTPROMPT_* variable included.
    """
    found = collect(variables(), SECRETS, options)
    settings, problems = None, found.problems
    try:
        settings = Settings(**found.values)
    except ValidationError as error:
        problems += [_line(problem, found) for problem in error.errors(include_url=False)]
    if settings is None or problems:
        raise InvalidSettings("\n".join(problems))
    return settings, {name: found.sources.get(name, DEFAULT) for name in Settings.model_fields}


def variables() -> dict[str, str]:
    """Environment variable -> field, of every setting."""
    return {PREFIX + field.upper(): field for field in Settings.model_fields}


def describe(settings: Settings, sources: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """Every setting as JSON has it, with where it comes from; secrets hidden."""
    values = settings.model_dump(mode="json")
    return {
        name: {"value": _shown(name, values[name]), "source": source.kind, "name": source.name or None}
        for name, source in sources.items()
    }


def _line(problem: Any, found: Collected) -> str:
    """One readable line, naming the setting as its user wrote it."""
    location = str(problem["loc"][0])  # the first alias, even where the second was used
    field = variables().get(location.upper(), location)
    if field not in Settings.model_fields:
        return f"{field} is not a setting; did you mean {nearest(field, Settings.model_fields)}?"
    source = found.sources.get(field, DEFAULT)
    name = (source.name or PREFIX + field.upper()) + " in .env" * (source.kind == ".env")
    reason = problem["msg"][:1].lower() + problem["msg"][1:]
    given_as = "set" if field in SECRETS else repr(_shown(field, problem["input"]))
    return f"{name} is {given_as}: {reason}"


def _shown(field: str, value: Any) -> Any:
    """Without the passwords of URLs."""
    if isinstance(value, list | tuple):
        return [_shown(field, item) for item in value]
    is_url = isinstance(value, str) and (field in URLS or "://" in value)
    return without_password(value) if is_url else value
