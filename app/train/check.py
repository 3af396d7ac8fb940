"""Training data is judged here, whole, before anything is trained: every row, then the rows beside each other."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from app.errors import InvalidRecipe
from app.strict_json import parse_object
from app.text import Template
from app.train.data import MAX_FILE_BYTES, MAX_ROWS, Row, split, task_names, task_of
from app.train.formats import DEFAULT_TEMPLATES, BadRow, Format, format_of, texts_of

MIN_ROWS = 10  # to train on
MAX_PROBLEMS = 20  # that are told one by one; the others are counted
MAX_LABELS = 200
MAX_LABEL = 200  # characters
ROWS_A_LABEL = 5  # on average, for targets to be taken for labels
_CHUNK = 500  # rows tokenised at once
_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PK": "zip"}


class BadData(Exception):
    """Nothing is trained on this. `param` names the file; `problems` are the first ones, `counts` all by code."""

    def __init__(self, message: str, *, param: str, problems: Sequence[dict[str, Any]] = (), counts: Any = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.problems = list(problems)
        self.counts: dict[str, int] = dict(counts or {})


@dataclass(frozen=True)
class Checked:
    """Rows that can be trained on, and what is to be said about them."""

    train: list[Row]
    validation: list[Row]
    template: str | None
    labels: list[str] | None
    report: dict[str, Any]  # JSON
    warnings: list[str] = field(default_factory=list)
    task: str | None = None  # of several the one that is published


@dataclass
class _File:
    """One file while it is read."""

    param: str  # "training_file" or "validation_file"
    rows: list[Row] = field(default_factory=list)
    formats: Counter[Format] = field(default_factory=Counter)
    problems: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    digest: str = ""
    has_bom: bool = False

    def note(self, line: int, code: str, message: str) -> None:
        self.counts[code] += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append({"file": self.param, "line": line, "code": code, "message": message})

    def refuse(self, message: str) -> BadData:
        return BadData(message, param=self.param, problems=self.problems, counts=self.counts)

    def judge(self) -> None:
        """Raises BadData if any row is bad."""
        if self.counts:
            number = sum(self.counts.values())
            told = "; ".join(f"line {item['line']}: {item['message']}" for item in self.problems[:5])
            more = f" (and {number - 5} more)" if number > 5 else ""
            raise self.refuse(f"{number} bad row{'s' * (number > 1)}: {told}{more}")


def check_data(
    training: Path,
    validation: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    room: int | None = None,
    template: str | None = None,
    classify: bool | None = None,
    several_tasks: bool = False,
    for_task: str | None = None,
    alive: Callable[[], None] = lambda: None,
) -> Checked:
    """Read both files and judge them; without a validation file a tenth of the rows is cut off.

    `max_length` is what prompt and answer of a row may have in tokens, `room` (by default the same) what prompt and
    each label may have where a row is scored. Tasks of rows matter with `several_tasks` alone; then only the labels of
    `for_task` count, by default the first by name. `alive` is called now and then. Raises BadData and InvalidRecipe.
    """
    read = partial(_read, tokenizer=tokenizer, several_tasks=several_tasks, alive=alive)
    train = read(training, "training_file")
    train.judge()
    kind = _format(train)
    text = DEFAULT_TEMPLATES[kind] if template is None else template
    given = None if validation is None else read(validation, "validation_file")
    if given is not None:
        given.judge()
        if _format(given) != kind:
            raise given.refuse(f"its rows are {_format(given)}, those of the training file {kind}")
    lengths = [_measure(file, tokenizer, Template(text), max_length, alive) for file in (train, given) if file]
    if len(train.rows) < MIN_ROWS:
        raise train.refuse(f"{len(train.rows)} rows are too few: at least {MIN_ROWS}")
    warnings = [
        f"{file.param} begins with a byte order mark, which is skipped"
        for file in (train, given)
        if file is not None and file.has_bom
    ]
    warnings += _duplicates(train.rows)
    task = _task(train, for_task) if several_tasks else None
    labels = _labels(train, classify, task)
    if given is None:
        rows, held_out = split(train.rows, stratify=labels is not None, by_task=several_tasks)
        if not held_out:
            raise train.refuse("all rows have the same input: none can be held out for validation")
    else:
        rows, held_out = train.rows, _unseen(given, train.rows, warnings)
    if not any(task in (None, row.task) for row in held_out):
        raise (given or train).refuse(f"no row for validation is of the task {task!r}, which is to be published")
    if labels is not None:
        ours, theirs = ([row for row in part if task in (None, row.task)] for part in (rows, held_out))
        _judge_labels(labels, ours, theirs, given, warnings)
        _judge_room(given or train, theirs, labels, tokenizer, Template(text), room or max_length)
    report = {
        "format": kind,
        "template": text,
        "training_rows": len(rows),
        "validation_rows": len(held_out),
        "validation": "given" if given else "held out",
        "training_file_digest": train.digest,
        "validation_file_digest": given.digest if given else None,
        "longest_row_tokens": max(map(max, lengths)),
        "mean_row_tokens": round(sum(lengths[0]) / len(lengths[0]), 1),
        "labels": None if labels is None else dict(Counter(row.target for row in rows).most_common()),
        "warnings": warnings,
    }
    return Checked(rows, held_out, text, labels, report, warnings, task)


def _read(
    path: Path, param: str, *, tokenizer: PreTrainedTokenizerBase, several_tasks: bool, alive: Callable[[], None]
) -> _File:
    """Raises BadData for what is no list of rows at all; bad rows are noted."""
    file = _File(param)
    data = path.read_bytes()
    file.digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if len(data) > MAX_FILE_BYTES:
        raise file.refuse(f"it has {len(data)} bytes, at most {MAX_FILE_BYTES}")
    for mark, name in _BOMS.items():
        if data.startswith(mark):
            raise file.refuse(f"it is {name}; JSON lines in UTF-8 are needed")
    file.has_bom = data.startswith(b"\xef\xbb\xbf")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"[":
        raise file.refuse("it is one JSON array; JSON lines are needed, one object a line")
    number_of_rows = 0
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        number_of_rows += 1
        if number_of_rows > MAX_ROWS:
            raise file.refuse(f"it has more than {MAX_ROWS} rows")
        if number_of_rows % _CHUNK == 0:
            alive()
        try:
            row = _parse(line)
            kind = format_of(row)
            source, target = texts_of(row, kind, tokenizer)
        except BadRow as error:
            file.note(number, error.code, error.message)
            continue
        file.formats[kind] += 1
        file.rows.append(Row(source, target, str(number), task_of(row) if several_tasks else ""))
    if not number_of_rows:
        raise file.refuse("it has no rows")
    return file


def _parse(line: bytes) -> dict[str, Any]:
    try:
        return parse_object(line)
    except UnicodeDecodeError as error:
        raise BadRow("not_utf8", f"not UTF-8 at byte {error.start + 1}") from None
    except UnicodeEncodeError:
        raise BadRow("lone_surrogate", "holds half a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise BadRow("not_json", f"not JSON ({error.msg}, column {error.colno})") from None
    except ValueError as error:
        raise BadRow("not_json", str(error)) from None


def _format(file: _File) -> Format:
    """Raises BadData."""
    if len(file.formats) > 1:
        shares = ", ".join(f"{count} {name}" for name, count in file.formats.most_common())
        raise file.refuse(f"its rows are of different formats: {shares}")
    return next(iter(file.formats))


def _measure(
    file: _File, tokenizer: PreTrainedTokenizerBase, template: Template, limit: int, alive: Callable[[], None]
) -> list[int]:
    """Tokens of every row, its end included. Raises BadData if one is too long, or has nothing to begin with."""
    lengths = []
    for first in range(0, len(file.rows), _CHUNK):
        rows = file.rows[first : first + _CHUNK]
        prompts: Any = tokenizer([template.prompt(row.input) for row in rows])["input_ids"]
        answers: Any = tokenizer([template.target(row.target) for row in rows], add_special_tokens=False)["input_ids"]
        for row, prompt, answer in zip(rows, prompts, answers, strict=True):
            length = len(prompt) + len(answer) + 1
            lengths.append(length)
            if not prompt:
                file.note(int(row.source), "empty_prompt", "leaves nothing for the model to read")
            elif not answer:
                file.note(int(row.source), "empty_target", "its answer has no tokens")
            elif length > limit:
                file.note(int(row.source), "too_long", f"has {length} tokens, at most {limit}")
        alive()
    file.judge()
    return lengths


def _duplicates(rows: Sequence[Row]) -> list[str]:
    answers = defaultdict(set)
    for row in rows:
        answers[row.input, row.task].add(row.target)
    warnings = []
    if repeated := len(rows) - len(set(rows)):
        warnings.append(f"{repeated} training rows repeat another one")
    if torn := sum(len(targets) > 1 for targets in answers.values()):
        warnings.append(f"{torn} inputs occur with different targets")
    return warnings


def _task(train: _File, wanted: str | None) -> str:
    """Raises InvalidRecipe."""
    names = task_names(train.rows)
    if wanted is not None and wanted not in names:
        raise InvalidRecipe("no row that is trained on has this task", param="for_task")
    return names[0] if wanted is None else wanted


def _labels(train: _File, classify: bool | None, task: str | None) -> list[str] | None:
    """The distinct targets if they are labels: few, short and each repeated. Raises BadData."""
    if classify is False:
        return None
    rows = [row for row in train.rows if task in (None, row.task)]
    found = sorted({row.target for row in rows})
    fits = 2 <= len(found) <= MAX_LABELS and max(map(len, found)) <= MAX_LABEL
    if classify is None:
        return found if fits and len(rows) >= ROWS_A_LABEL * len(found) else None
    if not fits:
        raise train.refuse(
            f"{len(found)} distinct targets cannot be labels; there must be 2 to {MAX_LABELS} of at most "
            f"{MAX_LABEL} characters"
        )
    return found


def _judge_labels(
    labels: list[str], rows: Sequence[Row], held_out: Sequence[Row], given: _File | None, warnings: list[str]
) -> None:
    counts = Counter(row.target for row in rows)
    strange = {row.target for row in held_out} - counts.keys()
    if strange and given is not None:
        for row in held_out:
            if row.target in strange:
                given.note(int(row.source), "unknown_label", "its label is not in the training file")
        given.judge()
    if rare := sum(counts[label] < ROWS_A_LABEL for label in labels):
        warnings.append(f"{rare} labels have fewer than {ROWS_A_LABEL} training rows")


def _judge_room(
    file: _File,
    rows: Sequence[Row],
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    room: int,
) -> None:
    """Raises BadData if a row that will be scored leaves no room for one of the labels, its own or another."""
    answers: Any = tokenizer([template.target(label) for label in labels], add_special_tokens=False)["input_ids"]
    prompts: Any = tokenizer([template.prompt(row.input) for row in rows])["input_ids"]
    longest = max(map(len, answers))
    for row, prompt in zip(rows, prompts, strict=True):
        if (length := len(prompt) + longest) > room:
            file.note(int(row.source), "too_long", f"has {length} tokens with the longest label, at most {room}")
    file.judge()


def _unseen(given: _File, train: Sequence[Row], warnings: list[str]) -> list[Row]:
    """Validation rows whose input is not trained on: on the others a score would say nothing. Raises BadData."""
    seen = {row.input for row in train}
    kept = [row for row in given.rows if row.input not in seen]
    if not kept:
        raise given.refuse("every row of it has an input that is also trained on")
    if dropped := len(given.rows) - len(kept):
        warnings.append(f"{dropped} validation rows have an input that is also trained on; they are left out")
    return kept
