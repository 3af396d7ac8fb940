"""Log lines: one JSON object or one readable line each, on standard error, whoever wrote them.

What a client sent stands in fields, in which nothing can begin another line; secrets are struck out wherever they are.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import structlog

Event = MutableMapping[str, Any]

# Keys of ours, and a password in a URL.
SECRETS = r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{16,}|(?<=://)[^/\s:@\"]*:[^/\s@\"]+(?=@)"
STRUCK_OUT = "[secret]"
LIBRARIES = ("transformers", "huggingface_hub")  # they write lines of their own unless told not to


def configure(level: str, kind: str, secrets: Iterable[str] = ()) -> None:
    """Have every logger write so from now on, unless whoever runs this process has seen to its logs already.

    `kind` is json, text, or auto: text on a terminal. `secrets` are struck out beside what looks like one.
    """
    root = logging.getLogger()
    if root.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(formatter("text" if kind == "auto" and sys.stderr.isatty() else kind, secrets))
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True


def formatter(kind: str, secrets: Iterable[str] = ()) -> logging.Formatter:
    """For lines of JSON, but where `kind` is text."""
    json_line = [structlog.processors.EventRenamer("message"), structlog.processors.JSONRenderer()]
    render: list[Any] = [structlog.processors.format_exc_info, *([_text] if kind == "text" else json_line)]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
        ],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render, _strike_out(secrets)],
    )


def _strike_out(secrets: Iterable[str]) -> Callable[[Any, str, Any], str]:
    # As they are, and as a line of JSON has them.
    exact = {form for secret in secrets if secret for form in (secret, json.dumps(secret)[1:-1])}
    pattern = re.compile("|".join([*map(re.escape, sorted(exact, key=len, reverse=True)), SECRETS]))

    def strike(_logger: Any, _method: str, line: Any) -> str:
        return pattern.sub(STRUCK_OUT, line)

    return strike


def _text(_logger: Any, _method: str, event: Event) -> str:
    """time level logger: message field=value ...; a traceback follows in lines of its own."""
    time, level, logger = (event.pop(name) for name in ("timestamp", "level", "logger"))
    message, exception = _escaped(event.pop("event")), event.pop("exception", None)
    fields = [f"{name}={_field(value)}" for name, value in event.items()]
    line = " ".join([f"{time} {level.upper()} {logger}: {message}", *fields])
    # Indented: what an exception says may have lines that look like ours.
    return "\n    ".join([line, *exception.splitlines()]) if exception else line


def _field(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=repr)
    return text if re.fullmatch(r"[\w./:@,+-]+", text, re.ASCII) else json.dumps(text)


def _escaped(text: Any) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
