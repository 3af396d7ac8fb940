"""The process of one training job: `python -m app.train.worker`, started by app.jobs.supervisor and by nobody else.

Its order is one line of JSON on standard input, which then stays open: at its end the server is gone, and so is this
process. It tells how it goes in lines of JSON on standard output (see app.jobs.worker), and everything else on standard
error. SIGTERM makes it save a checkpoint and stop.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer

from app.errors import InvalidRecipe, InvalidTrainingData, SoftpromptError, TrainingFailed
from app.text import Template
from app.train.check import BadData, check_data
from app.train.checkpoint import sync
from app.train.data import Row, read_rows
from app.train.memory import is_out_of_memory
from app.train.recipe import Recipe
from app.train.report import Progress

CHECKED, ROWS_TRAIN, ROWS_VALIDATION, OUT = "checked.json", "train.jsonl", "validation.jsonl", "out"
TELL_EVERY = 0.5  # seconds between two messages about steps
MAX_STEPS = 100_000  # that epochs may come to
_FULL = (errno.ENOSPC, errno.EDQUOT)

Tell = Callable[..., None]


class Stopped(BaseException):
    """SIGTERM has come. No Exception, so that nothing on the way takes it for a failure."""


class Stop:
    """Whether to stop; asked between steps."""

    def __init__(self) -> None:
        self._asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def check(self) -> None:
        """Raises Stopped."""
        if self._asked:
            raise Stopped


def main() -> int:
    """Carry out one order; 0 if the last message says how it ended."""
    tell = _own_output()
    stop = Stop()
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_die_with_the_server, daemon=True).start()
    try:
        {"check": check, "train": train_prompt}[order["action"]](order, tell, stop)
    except Stopped:
        tell("stopped")
    except BadData as error:
        tell(
            "refused",
            code="invalid_" + error.param,
            message=error.message,
            param=error.param,
            problems=error.problems,
            counts=error.counts,
        )
    except (InvalidTrainingData, InvalidRecipe) as error:
        tell("refused", code=error.code, message=error.message, param=error.param, problems=[], counts={})
    except TrainingFailed as error:
        tell("failed", code=error.code, message=error.message)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) not in _FULL and "No space left" not in str(error):
            raise
        tell("full")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        tell("failed", code="out_of_memory", message="the job needs more memory than it may have")
    return 0


def check(order: dict[str, Any], tell: Tell, stop: Stop) -> None:
    """Judge the data, and leave the rows, the recipe and the template for `train_prompt`. Raises BadData."""
    base, options = order["base"], order["options"]
    tokenizer: Any = AutoTokenizer.from_pretrained(base["path"], trust_remote_code=False, local_files_only=True)
    recipe = Recipe(**options["recipe"], seed=order["seed"])
    room = base["max_model_len"] - recipe.num_virtual_tokens
    max_length = min(recipe.max_length, room)
    if max_length < 2:
        raise InvalidRecipe("the virtual tokens leave no room in the context", param="num_virtual_tokens")

    def alive() -> None:
        stop.check()
        tell("alive")

    checked = check_data(
        Path(order["training"]),
        Path(order["validation"]) if order["validation"] else None,
        tokenizer,
        max_length=max_length,
        room=room,
        template=options["template"],
        classify=options["classify"],
        several_tasks=recipe.method == "multitask_prompt_tuning",
        for_task=options.get("for_task"),
        alive=alive,
    )
    steps = recipe.max_steps
    if options["num_epochs"] is not None:
        steps = options["num_epochs"] * math.ceil(len(checked.train) / recipe.batch_size)
        if steps > MAX_STEPS:
            raise InvalidRecipe(f"n_epochs come to {steps} steps, at most {MAX_STEPS}", param="n_epochs")
    fields = recipe.as_dict() | {"max_steps": steps, "warmup_steps": min(recipe.warmup_steps, steps - 1)}
    recipe = Recipe(**(fields | {"max_length": max_length}))
    work = Path(order["work"])
    work.mkdir(exist_ok=True)
    _write(work / ROWS_TRAIN, _json_lines(checked.train))
    _write(work / ROWS_VALIDATION, _json_lines(checked.validation))
    found = {"recipe": recipe.as_dict(), "template": checked.template, "labels": checked.labels, "task": checked.task}
    _write(work / CHECKED, json.dumps(found).encode())  # last: it says that the others are whole
    tell("checked", report=checked.report, max_steps=steps)


def train_prompt(order: dict[str, Any], tell: Tell, stop: Stop) -> None:
    """Train on what `check` left, from the last checkpoint on if there is one."""
    import torch  # these take seconds, which a check need not wait for
    from safetensors.torch import load_file

    from app.base_model import load_base_model
    from app.train.trainer import train

    torch.set_num_threads(order["threads"])
    work, given = Path(order["work"]), order["base"]
    checked = json.loads((work / CHECKED).read_bytes())
    tell("alive")
    base = load_base_model(
        given["path"], cache_dir=Path(given["cache_dir"]), device=given["device"], dtype=given["dtype"]
    )
    if base.info.fingerprint != given["fingerprint"]:
        raise TrainingFailed("the base model's files have changed since the server loaded them")
    tell("alive")
    told_at = 0.0

    def on_progress(progress: Progress) -> None:
        nonlocal told_at
        now = time.monotonic()
        if progress.validation_loss is not None or now - told_at >= TELL_EVERY:
            told_at = now
            tell("step", **vars(progress))
        stop.check()

    out = work / OUT
    out.mkdir(exist_ok=True)
    report = train(
        base.model,
        base.tokenizer,
        _rows(work / ROWS_TRAIN),
        _rows(work / ROWS_VALIDATION),
        Template(checked["template"]),
        Recipe(**checked["recipe"]),
        out,
        base_name=given["name"],
        base_fingerprint=given["fingerprint"],
        initial=load_file(order["initial"])["prompt"] if order["initial"] else None,
        on_progress=on_progress,
    )
    tell("trained", report=report.as_dict())


def _rows(path: Path) -> list[Row]:
    return read_rows(path, max_bytes=path.stat().st_size, max_rows=sys.maxsize)  # they were bounded when checked


def _json_lines(rows: Sequence[Row]) -> bytes:
    def member(row: Row) -> dict[str, str]:
        return {"input": row.input, "target": row.target} | ({"task": row.task} if row.task else {})

    return b"".join(json.dumps(member(row)).encode() + b"\n" for row in rows)


def _write(path: Path, data: bytes) -> None:
    draft = path.with_name(path.name + ".new")
    draft.write_bytes(data)
    sync(draft)
    os.replace(draft, path)
    sync(path.parent)


def _own_output() -> Tell:
    """Take standard output for messages; what a library prints goes to standard error from now on."""
    file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(kind: str, **members: Any) -> None:
        file.write(json.dumps({"kind": kind, **members}) + "\n")
        file.flush()

    return tell


def _die_with_the_server() -> None:
    # NOTE: not PR_SET_PDEATHSIG, which goes by the thread that started this process, and Linux alone has it.
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SoftpromptError as problem:
        sys.stderr.write(f"{problem.message}\n")
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
