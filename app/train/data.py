"""Training rows: a strict JSONL reader, their token ids, and seeded batches of like length."""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from app.errors import InvalidTrainingData
from app.text import Template

MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_ROWS = 200_000
MAX_FIELD_CHARACTERS = 1_000_000
MAX_HELD_OUT = 1_000  # rows cut off for validation
MAX_REFERENCES = 100  # of a row
_POOL_BATCHES = 8  # batches sorted together: enough to cut padding, few enough to stay random


@dataclass(frozen=True)
class Row:
    """One example; `source` ("train.jsonl:12") is for messages only and no part of its identity."""

    input: str
    target: str
    source: str = field(default="", compare=False)
    task: str = ""  # which of several, for multitask prompt tuning
    references: tuple[str, ...] = ()  # other right answers beside `target`


@dataclass(frozen=True)
class Example:
    """Token ids of one row: `ids` is prompt and answer, the answer starting at `start` (>= 1)."""

    ids: tuple[int, ...]
    start: int
    task: int = 0


def read_rows(
    path: Path, *, max_bytes: int = MAX_FILE_BYTES, max_rows: int = MAX_ROWS, references: bool = False
) -> list[Row]:
    """Read JSON lines `{"input": str, "target": str}`, perhaps with a "task".

    Other members are ignored, blank lines too.

    With `references` a row may have a list of other right answers under that name.
    Raises InvalidTrainingData naming file:line, never quoting the data.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise InvalidTrainingData(f"{path.name}: cannot be read ({error.strerror})") from error
    if len(data) > max_bytes:
        raise InvalidTrainingData(f"{path.name}: larger than {max_bytes} bytes")
    rows: list[Row] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        if len(rows) == max_rows:
            raise InvalidTrainingData(f"{path.name}:{number}: more than {max_rows} rows")
        rows.append(_parse_row(line, f"{path.name}:{number}", references=references))
    if not rows:
        raise InvalidTrainingData(f"{path.name}: no rows")
    return rows


def _parse_row(line: bytes, source: str, *, references: bool) -> Row:
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_members)
    except UnicodeDecodeError as error:
        raise InvalidTrainingData(f"{source}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InvalidTrainingData(f"{source}: not JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise InvalidTrainingData(f"{source}: JSON nested too deeply") from error
    except ValueError as error:
        raise InvalidTrainingData(f"{source}: {error}") from error
    if not isinstance(value, dict):
        raise InvalidTrainingData(f"{source}: not a JSON object")
    texts = [_text(value, name, source) for name in ("input", "target")]
    if not texts[1].strip():
        raise InvalidTrainingData(f"{source}: 'target' is empty")
    others = value.get("references", []) if references else []
    if not isinstance(others, list) or len(others) > MAX_REFERENCES:
        raise InvalidTrainingData(f"{source}: 'references' is not a list of at most {MAX_REFERENCES}")
    named = (_text({"references": other}, "references", source) for other in others)
    found = tuple(dict.fromkeys(text for text in named if text != texts[1]))
    return Row(texts[0], texts[1], source, task_of(value), found)


def task_of(row: dict[str, Any]) -> str:
    """The row's "task"; a member of that name that is no text is somebody's own."""
    task = row.get("task")
    return task if isinstance(task, str) else ""


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member appears twice")
    return members


def _text(value: dict[str, Any], name: str, source: str) -> str:
    if name not in value:
        raise InvalidTrainingData(f"{source}: no '{name}' member")
    text = value[name]
    if not isinstance(text, str):
        raise InvalidTrainingData(f"{source}: '{name}' is not a string")
    if len(text) > MAX_FIELD_CHARACTERS:
        raise InvalidTrainingData(f"{source}: '{name}' has {len(text)} characters, at most {MAX_FIELD_CHARACTERS}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" is legal JSON and no text
        raise InvalidTrainingData(f"{source}: '{name}' holds a lone surrogate") from error
    return text


def digest(train: Sequence[Row], validation: Sequence[Row]) -> str:
    """sha256 (hex) of the rows in their order; spelling of the JSON and file names do not count."""
    sha = hashlib.sha256()
    for rows in (train, validation):
        for row in rows:
            more = [list(row.references), row.task] if row.references or row.task else []
            sha.update(json.dumps([row.input, row.target, *more]).encode() + b"\n")
        sha.update(b"\n")
    return sha.hexdigest()


def split(rows: Sequence[Row], *, stratify: bool, by_task: bool) -> tuple[list[Row], list[Row]]:
    """Cut off a tenth of the rows, at most MAX_HELD_OUT and at least one: (to train on, held out).

    All rows of one input stay together. `stratify`: a tenth of each target, and never its last row; `by_task`: of each
    task. Held out are the inputs with the least digests, so a file that has grown keeps most of them: what is trained
    on it is compared with what was trained before on rows that neither has seen. What is held out may be empty where
    all rows have one input.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row.input].append(index)
    order = sorted(groups, key=lambda text: hashlib.sha256(text.encode(errors="surrogatepass")).digest())
    strata: dict[tuple[Any, ...], list[list[int]]] = defaultdict(list)
    for indices in (groups[text] for text in order):
        tasks = {rows[i].task for i in indices} if by_task else ()
        strata[*sorted(tasks), rows[indices[0]].target if stratify else ""].append(indices)
    share = min(0.1, MAX_HELD_OUT / len(rows))
    held: set[int] = set()
    for stratum in strata.values():
        wanted = sum(map(len, stratum)) * share
        taken = 0
        for indices in stratum[:-1]:
            if taken + len(indices) / 2 > wanted:
                break
            held.update(indices)
            taken += len(indices)
    if not held:
        spare = [stratum[0] for stratum in strata.values() if len(stratum) > 1]
        if not spare and len(strata) > 1:
            spare = [stratum[0] for stratum in strata.values()]
        held.update(*spare[:1])
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def hold_out(rows: Sequence[Row], *, by_task: bool = False) -> tuple[list[Row], list[Row]]:
    """`split` for those who need both parts. Raises InvalidTrainingData where there is nothing to hold out."""
    train, held = split(rows, stratify=False, by_task=by_task) if rows else ([], [])
    if not held:
        raise InvalidTrainingData("rows of at least 2 inputs are needed to hold one out for validation")
    return train, held


def count_shared(train: Sequence[Row], validation: Sequence[Row]) -> int:
    """How many validation rows have an input that is also a training input."""
    seen = {row.input for row in train}
    return sum(row.input in seen for row in validation)


def task_names(rows: Sequence[Row]) -> list[str]:
    """The distinct tasks of rows, sorted: the order of their numbers."""
    return sorted({row.task for row in rows})


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    limit: int,
    tasks: Sequence[str] | None = None,
) -> list[Example]:
    """Token ids of every row: the prompt, the answer, then end-of-text.

    `tasks` are those of the rows that are trained on, in the order of their numbers; None: tasks do not
    matter. `limit` is the most tokens (virtual tokens not counted) a row may have; longer rows are refused
    rather than cut, because a cut answer teaches the model to stop early.
    Raises InvalidTrainingData naming the row.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise InvalidTrainingData("the tokenizer has no end-of-text token to close answers with")
    if not rows:
        return []
    prompts = tokenizer([template.prompt(row.input) for row in rows])["input_ids"]
    answers = tokenizer([template.target(row.target) for row in rows], add_special_tokens=False)
    examples = []
    for number, (row, prompt, answer) in enumerate(zip(rows, prompts, answers["input_ids"], strict=True), start=1):
        source = row.source or f"row {number}"
        if not prompt:
            raise InvalidTrainingData(f"{source}: the template leaves an empty prompt")
        if not answer:
            raise InvalidTrainingData(f"{source}: 'target' has no tokens")
        ids = (*prompt, *answer, end)
        if len(ids) > limit:
            raise InvalidTrainingData(f"{source}: {len(ids)} tokens, at most {limit}")
        if tasks is not None and row.task not in tasks:
            raise InvalidTrainingData(f"{source}: no row that is trained on has its task")
        examples.append(Example(ids, len(prompt), 0 if tasks is None else tasks.index(row.task)))
    return examples


def batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, as row indices: every row once, rows of like length together.

    A pure function of its arguments, which is what lets a resumed run see the same batches.
    """
    generator = random.Random(f"batches {seed} {epoch}")
    order = generator.sample(range(len(lengths)), len(lengths))
    result = []
    for first in range(0, len(order), batch_size * _POOL_BATCHES):
        pool = sorted(order[first : first + batch_size * _POOL_BATCHES], key=lambda i: lengths[i])
        result += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    generator.shuffle(result)
    return result
