"""Where settings come from, the strongest first: options, the environment, a .env file; secrets also from files."""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dotenv.parser import parse_stream

PREFIX = "SOFTPROMPT_"
FILE = "_FILE"  # SOFTPROMPT_API_KEY_FILE names a file that holds SOFTPROMPT_API_KEY
ENV_FILE = Path(".env")  # in the working directory
MAX_FILE_BYTES = 64 << 10


@dataclass(frozen=True)
class Source:
    """Of one setting."""

    kind: Literal["default", "option", "environment", ".env", "file"]
    name: str  # of the option or the variable, as its user wrote it


DEFAULT = Source("default", "")


@dataclass
class Collected:
    """What was given, by field. `problems` has one line for each thing that is wrong, and never a value of a secret."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def take(self, name: str, value: Any, source: Source) -> None:
        self.values[name], self.sources[name] = value, source


def collect(variables: Mapping[str, str], secrets: Iterable[str], options: Mapping[str, Any]) -> Collected:
    """`variables` is variable -> field; of `secrets`, which are fields, files are read. Empty ones count as absent.

    Only SOFTPROMPT_* and PORT are ours, in a .env file too: whatever else stands there belongs to other programs.
    """
    found = Collected()
    known = {**variables, "PORT": "port"}
    files = {PREFIX + secret.upper() + FILE: secret for secret in secrets}
    of_secrets: dict[str, list[tuple[str, str]]] = {}  # secret -> the variables that name a file, the strongest first
    given: tuple[tuple[Literal["environment", ".env"], Mapping[str, str]], ...] = (
        ("environment", os.environ),
        (".env", _read_env_file(ENV_FILE, found.problems)),
    )
    for kind, pairs in given:
        # PORT is the weaker of its two names.
        for name, value in sorted(pairs.items(), key=lambda pair: pair[0].upper() == "PORT"):
            upper = name.upper()
            if upper in files:
                of_secrets.setdefault(files[upper], []).extend([(name, value)] if value else [])
            elif upper not in known:
                if upper.startswith(PREFIX):
                    found.problems.append(_unknown(name, [*variables, *files], kind))
            elif value and known[upper] not in found.values:
                found.take(known[upper], value, Source(kind, name))
    for secret, named in of_secrets.items():
        _read_secret(secret, named, found)
    for name, value in options.items():
        if value is not None:
            found.take(name, value, Source("option", name))
    return found


def nearest(name: str, names: Iterable[str]) -> str:
    return difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]


def _unknown(name: str, names: Iterable[str], kind: str) -> str:
    where = " in .env" if kind == ".env" else ""
    return f"{name}{where} is not a setting; did you mean {nearest(name.upper(), names)}?"


def _read_secret(secret: str, named: list[tuple[str, str]], found: Collected) -> None:
    if not named:
        return
    (variable, path), *_ = named
    if secret in found.values:
        found.problems.append(f"{found.sources[secret].name} and {variable} are both set: keep one of them")
        return
    text = _read(Path(path), variable, found.problems)
    if text is None:
        return
    text = text.rstrip("\r\n")
    if not text:
        found.problems.append(f"{variable}: the file is empty")
        return
    found.take(secret, text, Source("file", variable))


def _read_env_file(path: Path, problems: list[str]) -> dict[str, str]:
    """Variables of a .env file, nothing expanded; none if there is no such file. The last of equal names counts."""
    if not os.path.lexists(path):
        return {}
    text = _read(path, str(path), problems)
    found: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(text or "")):
        # NOTE: no line is repeated, because it may hold a secret.
        if binding.error:
            problems.append(f"{path}, line {binding.original.line}: not NAME=value")
        elif binding.key is not None and binding.value is not None:
            found[binding.key] = binding.value
        elif binding.key is not None and binding.key.upper().startswith(PREFIX):
            problems.append(f"{path}, line {binding.original.line}: {binding.key} has no value")
    return found


def _read(path: Path, name: str, problems: list[str]) -> str | None:
    """The text of a file; or None, and why. A path is not repeated: it may be a secret in the wrong variable."""
    try:
        with path.expanduser().open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
        return data.decode()
    except OSError as error:
        problems.append(f"{name}: the file cannot be read ({error.strerror})")
    except UnicodeDecodeError:
        problems.append(f"{name}: the file is not UTF-8")
    except ValueError as error:
        problems.append(f"{name}: the file is {error}")
    return None
