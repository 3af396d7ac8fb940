"""`softprompt batch`: order, errors, and what becomes of a run that was killed."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from filelock import FileLock, Timeout

from app.cli import batch
from app.cli.answers import AnswerFile, PrintedAnswers
from app.cli.rows import Row, read_rows
from app.errors import EngineFailed, Overloaded
from tests.api_harness import Harness
from tests.cli_harness import run

ANSWER = " positive review"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Harness, str]]:
    harness = Harness.create(tmp_path_factory.mktemp("batch") / "prompts", answer=ANSWER)
    harness.publish("mood", labels=["good", "bad"])
    harness.publish("topic", 0.3)
    with harness.listening() as server:
        yield harness, f"http://127.0.0.1:{server.port}"


@pytest.fixture
def harness(serving: tuple[Harness, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    harness, url = serving
    monkeypatch.setenv("SOFTPROMPT_URL", url)
    monkeypatch.setattr(batch, "PATIENCE", 1)
    monkeypatch.setattr("app.client.retries.random.uniform", lambda low, high: 0.0)
    yield harness
    harness.engine.fail_after = harness.engine.refuse = None
    harness.engine.calls.clear()


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path / "rows.jsonl", *({"input": f"text {i}", "id": f"r{i}", "target": "x"} for i in range(12))
    )


def test_answers_in_the_order_of_the_rows(harness: Harness, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = run("batch", rows, out, "--task", "mood", "--concurrency", 5, "--max-tokens", 3, "--json")
    assert done.document == {"rows": 12, "answered": 12, "failed": 0, "answered_before": 0}
    found = read(out)
    assert [row["line"] for row in found] == list(range(1, 13)) and [row["id"] for row in found][:2] == ["r0", "r1"]
    assert found[0]["version"] == "mood:1" and found[0]["finish_reason"] == "length"
    assert ANSWER.startswith(found[0]["output"]) and found[0]["usage"]["completion_tokens"] == 3
    asked = sorted(tuple(call.token_ids) for call in harness.engine.calls)
    assert asked == sorted(tuple(harness.tokens(f"text {i}")) for i in range(12))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_again_asks_nothing(harness: Harness, rows: Path, tmp_path: Path) -> None:
    run("batch", rows, tmp_path / "out", "--task", "mood")
    before = (tmp_path / "out").read_bytes()
    harness.engine.calls.clear()
    done = run("batch", rows, tmp_path / "out", "--task", "mood", "--json")
    assert done.document["answered_before"] == 12 and harness.engine.calls == []
    assert (tmp_path / "out").read_bytes() == before


@pytest.mark.parametrize("torn", [b"", b'{"line": 4, "outp', b'{"line": 4, "output": "caf\xc3'])
def test_what_was_killed_goes_on_where_it_was(harness: Harness, rows: Path, tmp_path: Path, torn: bytes) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run("batch", rows, whole, "--task", "mood")
    harness.engine.calls.clear()
    kept = [whole.read_bytes().splitlines(keepends=True)[index] for index in (6, 0, 2)]  # as they were answered
    out.write_bytes(b"".join(kept) + torn)
    done = run("batch", rows, out, "--task", "mood", "--json")
    assert done.document == {"rows": 12, "answered": 9, "failed": 0, "answered_before": 3}
    assert len(harness.engine.calls) == 9
    assert out.read_bytes().splitlines()[6] + b"\n" == kept[0], "an answer that was there is left as it is"
    assert [row["output"] for row in read(out)] == [row["output"] for row in read(whole)]


def test_a_last_line_that_only_lacks_its_end_counts(harness: Harness, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("batch", rows, out, "--task", "mood")
    out.write_bytes(out.read_bytes().removesuffix(b"\n"))
    harness.engine.calls.clear()
    run("batch", rows, out, "--task", "mood")
    assert harness.engine.calls == [] and len(read(out)) == 12


def test_a_run_that_is_interrupted_has_lost_nothing(
    harness: Harness, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, out = AnswerFile.add, tmp_path / "out"

    def add_three(answers: AnswerFile, record: dict[str, Any]) -> None:
        add(answers, record)
        if len(out.read_bytes().splitlines()) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "add", add_three)
        run("batch", rows, out, "--task", "mood", "--concurrency", 1, expect=130)
    assert [row["line"] for row in read(out)] == [1, 2, 3]
    harness.engine.calls.clear()
    run("batch", rows, out, "--task", "mood")
    assert len(harness.engine.calls) == 9 and len(read(out)) == 12


def test_rows_that_cannot_be_asked_are_errors_of_theirs(harness: Harness, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows", tmp_path / "out"
    lines = [
        '{"input": "a"}',
        "",
        "[]",
        '{"input": 3}',
        '{"no": 1}',
        "{",
        '{"input": "b", "task": []}',
        '{"input": "c"}',
    ]
    rows.write_bytes("\n".join(lines).encode() + b'\n{"input": "\xff"}\n{"input": "d", "task": "nothing"}')
    assert run("batch", rows, out, "--task", "mood", "--json", expect=6).document["failed"] == 7
    found = {row["line"]: row.get("error", {}).get("code") for row in read(out)}
    invalid = dict.fromkeys((3, 4, 5, 6, 7, 9), "invalid_row")
    assert found == {1: None, 8: None, 10: "not_found"} | invalid
    assert len(harness.engine.calls) == 2


def test_rows_that_failed_are_asked_again(harness: Harness, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    harness.engine.fail_after = (1, EngineFailed("it broke"))
    done = run("batch", rows, out, "--task", "mood", expect=6)
    assert done.err == "12 rows, 0 answered, 12 failed, 0 answered before\n"
    assert {row["error"]["code"] for row in read(out)} == {"engine_failed"}
    harness.engine.fail_after = None
    run("batch", rows, out, "--task", "mood")
    assert [row["output"] for row in read(out)] == [ANSWER] * 12


def test_a_server_that_is_full_for_good_ends_the_run_and_keeps_what_is_there(
    harness: Harness, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    harness.engine.refuse = (4, Overloaded("full"))
    error = run("batch", rows, out, "--task", "mood", "--concurrency", 2, "--json", expect=8).error
    assert error["code"] == "overloaded" and len(read(out)) == 4
    assert all("output" in row for row in read(out))


def test_rows_name_their_tasks(harness: Harness, tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "rows",
        {"input": "a", "task": "topic:1"},
        {"input": "b", "task": ["mood", "topic"]},
        {"input": "c"},
    )
    run("batch", rows, tmp_path / "out", expect=6)
    found = read(tmp_path / "out")
    assert found[0]["version"] == "topic:1" and found[1]["versions"] == ["mood:1", "topic:1"]
    assert "names no task" in found[2]["error"]["message"] and len(harness.engine.calls) == 3


@pytest.mark.usefixtures("harness")
def test_classify(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", {"input": "a"}, {"input": "b"})
    done = run("batch", rows, "-", "--task", "mood", "--classify")
    assert [row["line"] for row in done.documents] == [1, 2]
    assert set(done.documents[0]["probabilities"]) == {"good", "bad"} and done.documents[0]["version"] == "mood:1"
    other = run("batch", rows, "-", "--task", "topic", "--classify", "--label", "x", "--label", "y")
    assert other.documents[0]["label"] in ("x", "y")


@pytest.mark.usefixtures("harness")
def test_from_stdin_to_stdout() -> None:
    done = run("batch", "-", "-", "--task", "mood", "--json", stdin='{"input": "a"}\n{"input": "b"}\n')
    assert [row["output"] for row in done.documents] == [ANSWER] * 2


@pytest.mark.usefixtures("harness")
def test_refusals(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("batch", rows, out, "--task", "mood")
    before = out.read_bytes()
    for options in (["--task", "topic"], ["--task", "mood", "--max-tokens", 2], ["--task", "mood", "--classify"]):
        assert "answers something else in line 1" in run("batch", rows, out, *options, expect=2).err
    other = write_rows(tmp_path / "other", {"input": "a"})
    for wrong, what in ((other, "is not the output of a batch"), (rows, "same file"), ("/dev/null", "no file")):
        assert what in run("batch", rows, wrong, "--task", "mood", expect=2).err
    assert "is one task" in run("batch", rows, out, "--task", "mood,topic", expect=2).err
    assert run("batch", rows, out, "--task", "mood", "--temperature", "nan", expect=2).err.startswith("error (usage)")
    with FileLock(tmp_path / ".out.lock"):
        assert "another batch writes" in run("batch", rows, out, "--task", "mood", expect=2).err
    for options in (["--classify", "--seed", 1], ["--label", "x"], ["--concurrency", 0]):
        assert run("batch", rows, out, "--task", "mood", *options, expect=2).err.startswith("error (usage)")
    assert run("batch", rows, tmp_path / "new", "--task", "nothing", expect=4).out == ""
    assert run("batch", tmp_path / "none", out, "--task", "mood", expect=1).err.startswith("error (os_error)")
    assert out.read_bytes() == before and rows.read_text().count("\n") == 12
    run("batch", rows, out, "--task", "topic", "--restart")
    assert {row["version"] for row in read(out)} == {"topic:1"}


def test_restart_throws_nothing_away_before_there_is_an_answer(harness: Harness, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("batch", rows, out, "--task", "mood")
    before = out.read_bytes()
    given = rows.read_bytes()
    (tmp_path / "link").symlink_to(rows)
    for wrong in (rows, tmp_path / "link"):
        assert "same file" in run("batch", rows, wrong, "--task", "mood", "--restart", expect=2).err
    run("batch", tmp_path / "none", out, "--task", "mood", "--restart", expect=1)
    run("batch", rows, out, "--task", "nothing", "--restart", expect=4)
    harness.engine.refuse = (len(harness.engine.calls), Overloaded("full"))
    run("batch", rows, out, "--task", "topic", "--restart", expect=8)
    assert out.read_bytes() == before and rows.read_bytes() == given
    harness.engine.refuse = (len(harness.engine.calls) + 1, Overloaded("full"))
    run("batch", rows, out, "--task", "topic", "--restart", "--concurrency", 1, expect=8)
    assert [row["version"] for row in read(out)] == ["topic:1"]


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("foreign", [b"notes of mine", b'{"line', b'{"lines": 3, "x', b"\xff\x00"])
def test_an_unterminated_line_of_somebody_else_stays(rows: Path, tmp_path: Path, foreign: bytes) -> None:
    out = tmp_path / "out"
    run("batch", rows, out, "--task", "mood")
    for kept in (b"", out.read_bytes()):
        out.write_bytes(kept + foreign)
        ours = b'{"line": '.startswith(foreign)
        done = run("batch", rows, out, "--task", "mood", expect=0 if ours else 2)
        assert ours or ("is not the output of a batch" in done.err and out.read_bytes() == kept + foreign)


@pytest.mark.usefixtures("harness")
def test_a_run_that_is_refused_mends_nothing(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("batch", rows, out, "--task", "mood")
    out.write_bytes(out.read_bytes() + b'{"line": 4, "outp')
    before = out.read_bytes()
    run("batch", rows, out, "--task", "topic", expect=2)
    assert out.read_bytes() == before


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("out", ["out", "-"])
def test_half_a_surrogate_pair_is_a_row_that_fails(tmp_path: Path, out: str) -> None:
    rows = tmp_path / "rows"
    lines = [
        r'{"input": "\ud800"}',
        r'{"input": "a", "id": "\udfff"}',
        r'{"input": "a", "task": "\ud800"}',
        "[" * 100_000,
        '{"input": "b"}',
    ]
    rows.write_text("\n".join(lines))
    done = run("batch", rows, out if out == "-" else tmp_path / out, "--task", "mood", expect=6)
    found = done.documents if out == "-" else read(tmp_path / out)
    codes = [row.get("error", {}).get("code") for row in found]
    assert codes == ["invalid_row", None, "invalid_row", "invalid_row", None]
    assert found[1]["id"] == "\udfff" and "surrogate" in found[0]["error"]["message"]


@pytest.mark.usefixtures("harness")
def test_a_row_that_failed_may_be_mended_or_taken_out(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows", tmp_path / "out"
    write_rows(rows, {"input": "a"}, {"input": 3}, {"input": "c"}, {"input": 4})
    run("batch", rows, out, "--task", "mood", expect=6)
    write_rows(rows, {"input": "a"}, {"input": "three"}, {"input": "c"})
    assert run("batch", rows, out, "--task", "mood", "--json").document["answered_before"] == 2
    assert [(row["line"], row["output"]) for row in read(out)] == [(line, ANSWER) for line in (1, 2, 3)]


@pytest.mark.usefixtures("harness")
def test_answers_to_rows_that_are_gone_are_not_thrown_away(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("batch", rows, out, "--task", "mood")
    before = out.read_bytes()
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:4]))
    assert "has an answer to line 5, where IN has no row" in run("batch", rows, out, "--task", "mood", expect=2).err
    assert out.read_bytes() == before


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("options", [(), ("--restart",)])
def test_the_file_keeps_its_mode_and_a_link_to_it_stays_one(
    rows: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    kept, link = tmp_path / "kept", tmp_path / "link"
    kept.touch()
    kept.chmod(0o640)
    link.symlink_to(kept)
    run("batch", rows, link, "--task", "mood", *options)
    assert link.is_symlink() and len(read(kept)) == 12 and kept.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "link", "rows.jsonl"]


def test_the_lock_loses_its_name_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a second batch could hold it when the name goes, and a third would find none and be let in."""
    unlink, removed = os.unlink, []

    def checked(path: Any, **options: Any) -> None:
        if str(path).endswith(".lock"):
            with pytest.raises(Timeout):
                FileLock(path).acquire(timeout=0)
            removed.append(path)
        unlink(path, **options)

    monkeypatch.setattr("os.unlink", checked)
    with AnswerFile(tmp_path / "out"), pytest.raises(typer.BadParameter, match="another batch"):
        AnswerFile(tmp_path / "out")
    assert len(removed) == 1 and list(tmp_path.iterdir()) == []


def test_printed_answers_wait_for_those_before(capsys: pytest.CaptureFixture[str]) -> None:
    answers = PrintedAnswers()
    assert answers.begin(Row(line, "key") for line in (1, 3, 4)) == (3, 0)
    for line in (4, 1):
        answers.add({"line": line})
    assert capsys.readouterr().out == '{"line": 1}\n'
    answers.add({"line": 3})
    assert capsys.readouterr().out == '{"line": 3}\n{"line": 4}\n'


def test_no_more_rows_are_read_than_are_asked() -> None:
    """A file of any length is not held in memory."""
    taken = 0

    def lines() -> Iterator[bytes]:
        nonlocal taken
        while taken < 100:
            taken += 1
            yield b'{"input": "a"}'

    class Stopping(PrintedAnswers):
        def add(self, record: dict[str, Any]) -> None:
            raise OSError("the disk is full")

    class Client:
        async def __aenter__(self) -> Client:
            return self

        async def __aexit__(self, *_: object) -> None: ...

    job = batch._Run(Client(), Stopping(), classify=False)  # type: ignore[arg-type]
    job._ask = lambda row: asyncio.sleep(0, {"line": row.line})  # type: ignore[method-assign]
    with pytest.raises(OSError, match="full"):
        asyncio.run(job.ask_all(read_rows(lines(), lambda row: row), 3, lambda: None))
    assert taken <= 3
