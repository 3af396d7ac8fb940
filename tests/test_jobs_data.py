"""Training data that cannot be trained on: each kind is refused with what and where, before anything is trained."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.train import Row
from app.train.check import MAX_PROBLEMS, BadData, Checked, check_data
from app.train.data import split
from tests.jobs_harness import ROWS, jsonl
from tests.tiny import beginning_tokenizer, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
GOOD = json.dumps(ROWS[0]).encode()


def check(tmp_path: Path, data: bytes, validation: bytes | None = None, **options: Any) -> Checked:
    training = tmp_path / "training.jsonl"
    training.write_bytes(data)
    other = None
    if validation is not None:
        other = tmp_path / "validation.jsonl"
        other.write_bytes(validation)
    return check_data(training, other, TOKENIZER, **{"max_length": 100, **options})


def third(line: bytes) -> bytes:
    """A file whose third line this is."""
    good = jsonl(ROWS).splitlines()
    return b"\n".join([*good[:2], line, *good[2:]]) + b"\n"


def row(**members: Any) -> bytes:
    return third(json.dumps(members).encode())


def chat(*messages: Any) -> bytes:
    good = [json.dumps({"messages": [{"role": "user", "content": str(i)}, CHAT[1]]}).encode() for i in range(20)]
    return b"\n".join([*good[:2], json.dumps({"messages": messages}).encode(), *good[2:]])


# name -> (file, what the message must say, the code of the problem or None for the whole file)
BAD: dict[str, tuple[bytes, str, str | None]] = {
    "empty": (b"", "no rows", None),
    "blank lines": (b"\n \n\t\n", "no rows", None),
    "UTF-16": (jsonl(ROWS).decode().encode("utf-16"), "UTF-16", None),
    "gzip": (b"\x1f\x8b\x08\x00rest", "gzip", None),
    "zip": (b"PK\x03\x04rest", "zip", None),
    "one array": (json.dumps(ROWS).encode(), "JSON array", None),
    "too few": (jsonl(ROWS[:9]), "9 rows are too few", None),
    "one input": (jsonl([{"input": "x", "target": "y"}] * 20), "same input", None),
    "two formats": (third(b'{"prompt": "a", "completion": "b"}'), "different formats", None),
    "latin-1": (third('{"input": "é", "target": "x"}'.encode("latin-1")), "not UTF-8", "not_utf8"),
    "CSV": (third(b"input,target"), "not JSON", "not_json"),
    "cut off": (third(b'{"input": "a", "tar'), "not JSON", "not_json"),
    "trailing": (third(GOOD + b" x"), "not JSON", "not_json"),
    "single quotes": (third(b"{'input': 'a', 'target': 'b'}"), "not JSON", "not_json"),
    "no object": (third(b'"text"'), "not a JSON object", "not_json"),
    "NaN": (third(b'{"input": "a", "target": "b", "x": NaN}'), "NaN", "not_json"),
    "huge number": (third(b'{"input": "a", "target": "b", "x": 1e999}'), "64 bits", "not_json"),
    "long integer": (third(b'{"input": "a", "target": "b", "x": %s}' % (b"9" * 5000)), "digits", "not_json"),
    "twice": (third(b'{"input": "a", "input": "b", "target": "c"}'), "twice", "not_json"),
    "nested": (third(b'{"input": "a", "target": "b", "x": %s}' % (b"[" * 90_000)), "nested", "not_json"),
    "surrogate": (third(b'{"input": "\\ud800", "target": "x"}'), "surrogate", "lone_surrogate"),
    "no members": (row(), "neither", "unknown_format"),
    "other members": (row(text="a", label="b"), "neither", "unknown_format"),
    "both": (row(input="a", target="b", prompt="c", completion="d"), "and of", "ambiguous_format"),
    "no target": (row(input="a"), "no 'target'", "missing_member"),
    "no input": (row(target="a"), "no 'input'", "missing_member"),
    "number": (row(input=1, target="a"), "'input' is not a string", "wrong_type"),
    "null": (row(input="a", target=None), "'target' is not a string", "wrong_type"),
    "list": (row(input="a", target=["b"]), "'target' is not a string", "wrong_type"),
    "empty target": (row(input="a", target=""), "'target' is empty", "empty_target"),
    "white target": (row(input="a", target=" \n"), "'target' is empty", "empty_target"),
    "NUL": (row(input="a\0b", target="c"), "NUL", "control_character"),
    "too many tokens": (row(input="x" * 200, target="a"), "tokens, at most 100", "too_long"),
    "too many characters": (row(input="x" * 1_000_001, target="a"), "1000001 characters", "too_long"),
    "no list": (third(b'{"messages": "hi"}'), "must be a list", "bad_messages"),
    "no messages": (chat(), "must be a list of 2", "bad_messages"),
    "one message": (chat(CHAT[1]), "must be a list of 2", "bad_messages"),
    "user last": (chat(CHAT[1], CHAT[0]), "not the assistant's", "bad_messages"),
    "strange role": (chat({"role": "wizard", "content": "x"}, CHAT[1]), "the role of message 1", "bad_messages"),
    "message text": (chat("hi", CHAT[1]), "message 1 is not an object", "bad_messages"),
    "parts": (chat({"role": "user", "content": [{"type": "text"}]}, CHAT[1]), "not a string", "wrong_type"),
    "tool calls": (chat(CHAT[0], {**CHAT[1], "tool_calls": []}), "members besides", "bad_messages"),
    "empty answer": (chat(CHAT[0], {"role": "assistant", "content": " "}), "last message is empty", "empty_target"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(tmp_path: Path, kind: str) -> None:
    data, message, code = BAD[kind]
    with pytest.raises(BadData) as found:
        check(tmp_path, data)
    error = found.value
    assert message in error.message and error.param == "training_file", error.message
    assert len(error.message) < 500
    if code is not None:
        assert error.counts == {code: 1}
        [problem] = error.problems
        assert problem["line"] == 3 and problem["code"] == code and problem["file"] == "training_file"
        assert "line 3" in error.message
    with pytest.raises(BadData) as found:
        check(tmp_path, jsonl(ROWS) if "messages" not in data.decode("latin-1") else chat(*CHAT), data)
    assert found.value.param == "validation_file" or kind in ("too few", "one input")


def test_problems_are_counted_and_the_first_are_told(tmp_path: Path) -> None:
    lines = [b"{", GOOD, b'{"input": "a"}'] * 30
    with pytest.raises(BadData) as found:
        check(tmp_path, b"\n".join(lines))
    assert found.value.counts == {"not_json": 30, "missing_member": 30}
    assert [item["line"] for item in found.value.problems][:4] == [1, 3, 4, 6]
    assert len(found.value.problems) == MAX_PROBLEMS
    assert found.value.message.startswith("60 bad rows: line 1: ") and "(and 55 more)" in found.value.message


def test_too_many_rows_or_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.train.check.MAX_ROWS", 39)
    with pytest.raises(BadData, match="more than 39 rows"):
        check(tmp_path, jsonl(ROWS))
    monkeypatch.setattr("app.train.check.MAX_FILE_BYTES", 100)
    with pytest.raises(BadData, match="at most 100"):
        check(tmp_path, jsonl(ROWS))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input": str(i), "target": "same"} for i in range(20)], "1 distinct targets cannot be labels"),
        ([{"input": str(i), "target": "x" * 201 if i else "y"} for i in range(20)], "cannot be labels"),
    ],
)
def test_what_cannot_be_labels(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(BadData, match=message):
        check(tmp_path, jsonl(rows), classify=True, max_length=300)
    assert check(tmp_path, jsonl(rows), max_length=300).labels is None


def test_validation_rows_must_fit_the_training_rows(tmp_path: Path) -> None:
    strange = [{"input": "new", "target": "sideways"}, {"input": "newer", "target": "negative"}]
    with pytest.raises(BadData) as found:
        check(tmp_path, jsonl(ROWS), jsonl(strange))
    assert found.value.counts == {"unknown_label": 1} and found.value.param == "validation_file"
    with pytest.raises(BadData, match="also trained on"):
        check(tmp_path, jsonl(ROWS), jsonl(ROWS[:5]))
    with pytest.raises(BadData, match="its rows are prompt/completion"):
        check(tmp_path, jsonl(ROWS), jsonl([{"prompt": "a", "completion": "b"}] * 3))
    checked = check(tmp_path, jsonl(ROWS), jsonl([*ROWS[:5], {"input": "new", "target": "positive"}]))
    assert [item.input for item in checked.validation] == ["new"] and len(checked.train) == len(ROWS)
    assert any("5 validation rows" in warning for warning in checked.warnings)


def test_good_files(tmp_path: Path) -> None:
    checked = check(tmp_path, b"\xef\xbb\xbf" + jsonl(ROWS).replace(b"\n", b"\r\n"))
    assert checked.labels == ["negative", "positive"] and checked.template == "{input}\n"
    assert (len(checked.train), len(checked.validation)) == (36, 4)
    assert checked.report["training_rows"] == 36 and checked.report["labels"] == {"negative": 18, "positive": 18}
    assert any("byte order mark" in warning for warning in checked.warnings)
    completions = [{"prompt": f"p{i}", "completion": f" answer {i}", "weight": 1} for i in range(20)]
    checked = check(tmp_path, jsonl(completions))
    assert checked.labels is None and checked.template is None
    assert {row.target for row in checked.train} < {item["completion"] for item in completions}, "as they are"
    checked = check(tmp_path, chat(*CHAT))
    assert {row.target for row in checked.train} == {"yes"}
    assert any(row.input == "user: hi\nassistant:" for row in [*checked.train, *checked.validation])


def test_duplicates_are_told(tmp_path: Path) -> None:
    torn = [*ROWS, ROWS[0], {**ROWS[1], "target": "negative"}]
    checked = check(tmp_path, jsonl(torn))
    assert "1 training rows repeat another one" in checked.warnings
    assert "1 inputs occur with different targets" in checked.warnings


def test_a_chat_s_first_token_is_not_written_twice(tmp_path: Path) -> None:
    tokenizer = beginning_tokenizer()
    path = tmp_path / "x"
    path.write_bytes(chat(*CHAT))
    checked = check_data(path, None, tokenizer, max_length=100)
    text = next(row.input for row in [*checked.train, *checked.validation] if "hi" in row.input)
    direct = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer(text)["input_ids"] == tokenizer(direct, add_special_tokens=False)["input_ids"]


rows = st.lists(
    st.builds(Row, st.sampled_from([f"i{n}" for n in range(30)]), st.sampled_from(["a", "b", "c"])),
    min_size=2,
    max_size=80,
)


@given(rows, st.booleans(), st.booleans())
def test_split(rows: list[Row], stratify: bool, by_task: bool) -> None:
    train, held = split(rows, stratify=stratify, by_task=by_task)
    assert Counter(train) + Counter(held) == Counter(rows)
    assert not {row.input for row in train} & {row.input for row in held}, "no input on both sides"
    assert train and bool(held) == (len({row.input for row in rows}) > 1)
    assert (train, held) == split(rows, stratify=stratify, by_task=by_task)


def test_a_split_is_stratified_and_the_same_whatever_the_order() -> None:
    many = [Row(str(n), "rare" if n % 10 == 0 else "often") for n in range(200)]
    _, held = split(many, stratify=True, by_task=False)
    assert Counter(row.target for row in held) == {"rare": 2, "often": 18}
    again = split(many[::-1], stratify=True, by_task=False)[1]
    assert set(again) == set(held) and max(int(row.input) for row in held) > 100 > min(int(row.input) for row in held)


def test_a_file_that_has_grown_keeps_what_it_held_out() -> None:
    many = [Row(f"row {n}", "ab"[n % 2]) for n in range(360)]
    for stratify in (False, True):
        before, after = (split(rows, stratify=stratify, by_task=False) for rows in (many[:300], many))
        assert len(set(after[1]) & set(before[0])) <= 3, "of 36 rows those that the first one was trained on"


def test_tasks_that_do_not_matter_part_no_input_and_make_no_strata(tmp_path: Path) -> None:
    path = tmp_path / "train"
    path.write_bytes(jsonl([{"input": f"i{n % 20}", "target": "ab"[n % 2], "task": f"t{n}"} for n in range(200)]))
    checked = check_data(path, None, tiny_tokenizer(), max_length=100)
    assert len(checked.validation) == 20 and "180 training rows repeat another one" in checked.warnings
    assert not {row.input for row in checked.validation} & {row.input for row in checked.train}


def test_each_task_has_rows_held_out() -> None:
    many = [
        Row(f"{task}{n}", f"t{n}", task=task) for task, count in (("large", 200), ("small", 20)) for n in range(count)
    ]
    _, held = split(many, stratify=False, by_task=True)
    assert Counter(row.task for row in held) == {"large": 20, "small": 2}
    both = [replace(row, task=task) for row in many for task in ("one", "two")]
    train, held = split(both, stratify=False, by_task=True)
    assert Counter(row.task for row in held) == {"one": 22, "two": 22}
    assert not {row.input for row in train} & {row.input for row in held}


def test_a_row_that_is_scored_has_room_for_every_label(tmp_path: Path) -> None:
    training, validation = tmp_path / "train", tmp_path / "validation"
    training.write_bytes(jsonl([{"input": f"i{n}", "target": "a" if n % 2 else "b" * 40} for n in range(20)]))
    row = {"input": "q" * 50, "target": "a"}
    validation.write_bytes(jsonl([row]))
    length = len(tiny_tokenizer()("q" * 50 + "\n")["input_ids"]) + len(tiny_tokenizer()("b" * 40)["input_ids"])
    check = partial(check_data, training, validation, tiny_tokenizer(), max_length=length - 1)
    assert check(room=length).validation[0].target == "a"
    with pytest.raises(BadData, match=f"line 1: has {length} tokens with the longest label, at most {length - 1}"):
        check()


def test_the_published_task_needs_rows_for_validation(tmp_path: Path) -> None:
    training, validation = tmp_path / "train", tmp_path / "validation"
    lines = [{"input": f"{task}{n}", "target": "x", "task": task} for task in "ab" for n in range(20)]
    training.write_bytes(jsonl(lines))
    validation.write_bytes(jsonl([{"input": "new", "target": "x", "task": "b"}]))
    with pytest.raises(BadData, match="no row for validation is of the task 'a'"):
        check_data(training, validation, tiny_tokenizer(), max_length=100, several_tasks=True, for_task="a")
    checked = check_data(training, None, tiny_tokenizer(), max_length=100, several_tasks=True, for_task="a")
    assert {row.task for row in checked.validation} == {"a", "b"}
