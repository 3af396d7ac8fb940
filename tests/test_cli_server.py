"""Commands that talk to a server, against one that listens: what they print, and what they end with."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.cli import ask, output
from app.cli.completion import join_words
from app.cli.server import complete_reference
from app.client import AsyncClient, Client, DigestMismatch, NotFound
from app.errors import EngineFailed, Overloaded
from tests.access_harness import KeyedHarness
from tests.api_harness import Harness, files
from tests.cli_harness import Terminal, run
from tests.shipped import ROOT

ANSWER = " positive review"
BASE = "tiny-llama"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Harness, str]]:
    harness = Harness.create(tmp_path_factory.mktemp("cli") / "prompts", answer=ANSWER)
    harness.publish("mood", 0.1, labels=["good", "bad"], tags={"lang": "en"}, description="Moods.\x1b[31m")
    harness.publish("mood", 0.2, labels=["good", "bad"])
    harness.publish("topic", 0.3)
    with harness.listening() as server:
        yield harness, f"http://127.0.0.1:{server.port}"


@pytest.fixture
def harness(serving: tuple[Harness, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    harness, url = serving
    monkeypatch.setenv("SOFTPROMPT_URL", url)
    monkeypatch.setattr("app.client.retries.random.uniform", lambda low, high: 0.0)
    yield harness
    harness.engine.fail_after = harness.engine.refuse = None
    harness.engine.calls.clear()
    harness.answer(ANSWER)


def peft_folder(path: Path, content: float) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_bytes(files(content)["adapter_config"])
    (path / "adapter_model.safetensors").write_bytes(files(content)["adapter_model"])
    return path


@pytest.mark.usefixtures("harness")
def test_generate() -> None:
    assert run("generate", "mood:1", "a film").out == ANSWER + "\n"
    document = run("generate", "mood:1", "a film", "--json", "--n", 2).document
    assert [output["text"] for output in document["outputs"]] == [ANSWER] * 2 and document["version"] == 1
    *pieces, last = run("generate", "mood", "a film", "--json", "--stream").documents
    assert "".join(piece["text"] for piece in pieces) == ANSWER and len(pieces) > 1 and "usage" in last
    assert run("generate", "mood,topic", "a film").out == ANSWER + "\n"
    assert run("generate", "mood,topic", "a film", "--json").document["members"][1]["task"] == "topic"
    assert run("generate", "mood", "a film", "--n", 2).out == f"{ANSWER}\n" * 2
    assert "--json" in run("generate", "mood", "a film", "--n", 2, "--stream", expect=2).err
    several = run("generate", "mood", "a film", "--n", 2, "--stream", "--json").documents
    assert {event["index"] for event in several if "index" in event} == {0, 1}
    assert run("generate", BASE, "a film", "--json").document["task"] is None


def test_the_options_of_generate_arrive(harness: Harness) -> None:
    options = ("--max-tokens", 3, "--temperature", 0.5, "--top-p", 0.9, "--top-k", 7, "--seed", 11, "--stop", "x")
    document = run("generate", "mood", "a film", *options, "--raw", "--user", "u", "--json").document
    assert document["usage"]["completion_tokens"] == 3
    params = harness.engine.calls[-1].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (3, 0.5, 0.9, 7)
    assert run("generate", "mood", "x", "--temperature", -1, expect=1).err.startswith("error (invalid_request): ")
    assert run("generate", "mood", "x", "--deadline", 0, expect=2).out == ""
    for option in ("--temperature", "--top-p", "--deadline"):
        for value in ("nan", "inf", "-inf"):
            told = run("generate", "mood", "x", f"{option}={value}", expect=2).err
            assert told.startswith("error (usage): ") and option in told
    assert run("bench", "mood", "--duration", "nan", expect=2).out == ""


def test_the_input_of_generate(harness: Harness) -> None:
    tokens = harness.tokens
    for arguments, stdin, text in [
        (("-",), "from\nstdin\n", "from\nstdin"),
        ((), "née\n\n", "née\n"),
        (("--", "--json"), "", "--json"),
    ]:
        run("generate", BASE, *arguments, stdin=stdin)
        assert harness.engine.calls[-1].token_ids == tokens(text)
    assert run("generate", BASE, "\udcff", expect=2).err.startswith("error (usage): ")
    assert run("classify", "mood", terminal=True, expect=2).err.startswith("error (usage): ")


def test_a_stream_that_breaks_is_an_error_after_what_came(harness: Harness) -> None:
    harness.engine.fail_after = (1, EngineFailed("it broke"))
    done = run("generate", "mood", "a film", expect=1)
    assert ANSWER.startswith(done.out.rstrip("\n")) and done.out.endswith("\n")
    assert done.err == "error (engine_failed): it broke\n"


def test_a_busy_server_is_asked_again_and_then_told(harness: Harness) -> None:
    harness.engine.refuse = (0, Overloaded("full"))
    done = run("generate", "mood", "a film", "--json", expect=8)
    assert done.error["code"] == "overloaded" and done.error["retry_after"] == 1.0 and done.error["request_id"]


@pytest.mark.usefixtures("harness")
def test_classify() -> None:
    document = run("classify", "mood", "a film", "--json").document
    [result] = document["results"]
    assert set(result["probabilities"]) == {"good", "bad"} and result["label"] in result["probabilities"]
    first = run("classify", "topic", "a film", "--label", "x", "--label", "yy").out.splitlines()
    assert first[0].split() == ["label", "probability"] and len(first) == 3
    assert run("classify", "topic", "a film", "--json", expect=1).error["param"] == "labels"


@pytest.mark.usefixtures("harness")
def test_list_and_show() -> None:
    rows = [line.split() for line in run("list").out.splitlines()]
    assert rows[:2] == [["task", "versions", "newest", "aliases"], ["mood", "2", "2", "latest=2"]]
    assert [task["task"] for task in run("list", "--json").document[:2]] == ["mood", "topic"]
    assert [task["task"] for task in run("list", "--tag", "lang=en", "--json").document] == ["mood"]
    assert [version["version"] for version in run("list", "mood", "--json").document][:2] == [1, 2]
    shown = run("list", "mood").out
    assert "Moods.\\x1b[31m" in shown and "\x1b" not in shown, "a description does not command a terminal"
    assert run("show", "mood@latest", "--json").document["reference"] == "mood:2"
    assert "PROMPT_TUNING" in run("show", "mood:1").out and "Moods.\\x1b[31m" in run("show", "mood:1").out
    assert run("show", "mood:9", "--json", expect=4).error["status"] == 404
    for command in ("show", "inspect"):
        assert run(command, BASE, "--json", expect=4).error["code"] == "not_found"
    assert run("show", BASE, expect=4).err.endswith("is the base model and has no versions\n")
    assert run("list", "--deleted", expect=2).out == ""


@pytest.mark.usefixtures("harness")
def test_push_and_pull(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft", 0.7)
    (folder / "manifest.json").write_text(json.dumps({"template": "{input}!", "labels": ["a", "b"]}))
    document = run("push", "fresh", folder, "--alias", "staging", "--json").document
    assert (document["reference"], document["aliases"], document["template"]) == ("fresh:1", ["staging"], "{input}!")
    assert "was published before as fresh:1" in run("push", "fresh", folder, "--alias", "").out
    assert run("push", "fresh", peft_folder(tmp_path / "two", 0.8)).out.startswith("published fresh:2  sha256:")
    pulled = tmp_path / "deep" / "pulled"
    assert run("pull", "fresh@staging", pulled, "--json").document["digest"] == document["digest"]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (pulled / name).read_bytes() == (folder / name).read_bytes()
    assert [path.name for path in pulled.parent.iterdir()] == ["pulled"], "no draft is left"
    assert "was published before as fresh:1" in run("push", "fresh", pulled, "--alias", "").out
    assert "is no empty folder" in run("pull", "fresh", pulled, expect=1).err
    assert run("push", "fresh", tmp_path / "deep", "--json", expect=1).error["code"] == "os_error"
    (tmp_path / "two" / "adapter_model.safetensors").write_bytes(b"no")
    assert run("push", "fresh", tmp_path / "two", "--json", expect=1).error["status"] == 422


def test_a_file_that_is_not_what_its_digest_says_is_not_written(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = type(harness.registry).read_file

    def spoilt(registry: Any, task: str, number: int, name: str) -> bytes:
        return read(registry, task, number, name) + b" " * (name == "adapter_model.safetensors")

    monkeypatch.setattr(type(harness.registry), "read_file", spoilt)
    assert run("pull", "mood:1", tmp_path / "out", "--json", expect=1).error["code"] == "digest_mismatch"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("harness")
def test_aliases() -> None:
    assert run("alias", "set", "mood", "prod", 1).err == "mood@prod is 1\n"
    assert run("alias", "set", "mood", "prod", 2, "--new", "--json", expect=5).error["status"] == 412
    moved = run("alias", "set", "mood", "prod", "1=0.75", "2=0.25", "--json").document
    assert moved["weights"] == {"1": 0.75, "2": 0.25} and moved["etag"].startswith('"')
    assert run("alias", "show", "mood", "prod", "--json").document == moved
    assert [alias["alias"] for alias in run("alias", "show", "mood", "--json").document] == ["latest", "prod"]
    assert "1=0.75 2=0.25" in run("alias", "show", "mood").out
    assert run("rollback", "mood", "prod").err == "mood@prod is 1\n"
    assert run("rollback", "mood", "prod", "--if-match", moved["etag"], expect=5).out == ""
    assert run("alias", "remove", "mood", "prod", "--if-match", moved["etag"], expect=5).out == ""
    assert run("alias", "remove", "mood", "prod", "--json").document["deleted"] is True
    assert run("alias", "show", "mood", "prod", expect=4).out == ""
    assert run("alias", "set", "mood", "prod", 99, expect=4).out == ""
    run("alias", "set", "mood", "prod", 1)
    for target in (
        *(["1=x"], ["1", "2"], ["1=0.5", "1=0.5"], ["1=0.5", "01=0.5"], ["one"], ["+1"], ["0"], ["1_0"]),
        *(["2=0.1"], ["1=0.9", "2=0.2"], ["1=90", "2=10"], ["1=1", "2=0"], ["1=1.5", "2=-0.5"], ["1=nan", "2=0.5"]),
    ):
        assert run("alias", "set", "mood", "prod", *target, expect=2).err.startswith("error (usage): ")
    assert "sum to 0.1" in run("alias", "set", "mood", "prod", "2=0.1", expect=2).err
    assert "--new" in run("alias", "set", "mood", "prod", 2, "--new", "--if-match", '"1"', expect=2).err
    assert run("alias", "show", "mood", "prod", "--json").document["version"] == 1
    assert run("alias", "set", "mood", "prod", "1=0.333333", "2=0.666667").code == 0
    run("alias", "remove", "mood", "prod")
    changes = run("history", "mood", "--json", "--limit", 2).document
    assert [change["op"] for change in changes] == ["remove_alias", "split_alias"]
    assert "split_alias" in run("history", "mood").out


@pytest.mark.usefixtures("harness")
def test_a_move_in_between_is_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Client.alias

    def seen_then_moved(client: Client, *names: str) -> Any:
        found = seen(client, *names)
        client.set_alias("mood", "raced", version=2, etag=found.etag)
        return found

    run("alias", "set", "mood", "raced", 1)
    monkeypatch.setattr(Client, "alias", seen_then_moved)
    assert run("alias", "set", "mood", "raced", 1, "--json", expect=5).error["code"] == "precondition_failed"


def test_delete_and_restore(harness: Harness) -> None:
    harness.publish("gone", 0.4)
    harness.publish("gone", 0.5)
    assert run("rm", "gone:2", "--yes", expect=5).err.startswith("error (precondition_failed): ")
    assert run("rm", "gone:1", stdin="n\n", expect=1).err.endswith("nothing was done\n")
    assert harness.registry.resolve("gone:1")
    assert run("rm", "gone:1", stdin="y\n").err.endswith("gone:1 is deleted\n")
    assert [version["version"] for version in run("list", "gone", "--deleted", "--json").document] == [1]
    assert run("restore", "gone:1", "--json").document["reference"] == "gone:1"
    run("alias", "remove", "gone", "latest")
    assert run("rm", "gone", "--yes", "--json").document == {"id": "gone", "deleted": True, "object": "task"}
    for name in ("gone@latest", "gone:x", ":1", "gone:"):
        assert run("rm", name, "--yes", expect=2).out == ""
    assert run("restore", "gone", expect=2).out == ""


@pytest.mark.usefixtures("harness")
def test_inspect() -> None:
    document = run("inspect", "mood:1", "--neighbors", 2, "--json").document
    assert len(document["virtual_tokens"]) == 4 and len(document["virtual_tokens"][0]["nearest"]) == 2
    assert "topic:1" in run("inspect", "mood").out


def test_bench(harness: Harness) -> None:
    load = ("--concurrency", 4, "--requests", 9, "--max-tokens", 5)
    report = run("bench", "mood", "topic", BASE, *load, "--json").document
    assert report["requests"] == 9 and report["errors"] == {} and report["completion_tokens"] == 45
    assert report["by_task"] == {"mood": 3, "topic": 3, BASE: 3}
    for name in ("time_to_first_token_ms", "inter_token_latency_ms", "request_latency_ms"):
        assert 0 <= report[name]["p50"] <= report[name]["p99"] <= report[name]["max"]
    harness.engine.refuse = (len(harness.engine.calls) + 3, Overloaded("full"))
    done = run("bench", "mood", "--requests", 5, "--concurrency", 1, "--max-tokens", 2, expect=6)
    assert "3 requests" in done.out and "overloaded 2" in done.out
    assert run("bench", "nothing", "--requests", 1, expect=4).out == ""


def test_bench_for_a_time_and_with_rows(harness: Harness, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"input": "a"}\n{"input": "bb"}\n')
    report = run("bench", BASE, "--duration", 0.05, "--concurrency", 1, "--data", data, "--json").document
    assert report["requests"] >= 1 and report["seconds"] >= 0.05
    assert harness.engine.calls[0].token_ids == harness.tokens("a")
    data.write_text('{"x": 1}\n')
    assert run("bench", BASE, "--data", data, expect=2).out == ""


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"input": "a"}\n')
        for command in (["list"], ["generate", "mood", "x"], ["batch", rows, tmp_path / "out", "--task", "mood"]):
            error = run(*command, "--url", url, "--json", expect=3).error
            assert error["code"] == "connection_failed" and url in error["message"]
        assert complete_reference("") == []
    for wrong in (["--url", "nowhere"], ["--api-key", "short"]):
        error = run("list", *wrong, "--json", expect=2).error
        assert error["code"] == "invalid_settings" and "short" not in error["message"]
    for wrong in ("me:sesame@nowhere", "http://me:sesame@nowhere:port", "http://me:ses@me@nowhere:99999999"):
        message = run("list", "--url", wrong, "--json", expect=2).error["message"]
        assert "***@nowhere" in message and "ses" not in message.replace("addresses", "")


def test_a_server_of_another_kind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>")

        thread = threading.Thread(target=answer)
        thread.start()
        done = run("list", "--url", f"http://127.0.0.1:{listener.getsockname()[1]}", "--json", expect=3)
        thread.join()
    assert done.error["code"] == "invalid_reply"


def test_keys(tmp_path: Path) -> None:
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    harness.publish("mood")
    secret = harness.key("prompts:read")["Authorization"].split()[1]
    with harness.listening() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTPROMPT_URL", f"http://127.0.0.1:{server.port}")
        assert run("list", "--json", expect=7).error["status"] == 401
        assert [task["task"] for task in run("list", "--json", "--api-key", secret).document] == ["mood"]
        patch.setenv("SOFTPROMPT_API_KEY", secret)
        assert run("list", "mood").code == 0 and complete_reference("mo") == ["mood"]
        error = run("generate", "mood", "x", "--json", expect=7).error
        assert error["status"] == 403 and secret not in json.dumps(error)


@pytest.mark.usefixtures("harness")
def test_names_are_completed_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert complete_reference("mo") == ["mood"] and complete_reference("x") == []
    assert complete_reference("mood@l") == ["mood@latest"] and complete_reference("mood:2") == ["mood:2"]
    assert complete_reference("nope@") == []
    monkeypatch.setenv("SOFTPROMPT_URL", "nonsense")
    assert complete_reference("mo") == []


@pytest.mark.parametrize(
    ("words", "joined", "before"),
    [
        (["softprompt", "show", "mo"], ["softprompt", "show", "mo"], 0),
        (["softprompt", "show", ""], ["softprompt", "show", ""], 0),
        (["softprompt", "show", "mood", ":", "2"], ["softprompt", "show", "mood:2"], 5),
        (["softprompt", "show", "mood", ":"], ["softprompt", "show", "mood:"], 5),
        (["softprompt", "show", "mood", "@", "la"], ["softprompt", "show", "mood@la"], 4),
        (["softprompt", "batch", "a", "--task", "=", "mo"], ["softprompt", "batch", "a", "--task=mo"], 0),
        (["softprompt", "batch", "--task", "=", "mood", ":", "2"], ["softprompt", "batch", "--task=mood:2"], 5),
        (["softprompt", "show", "mood:2"], ["softprompt", "show", "mood:2"], 0),
    ],
)
def test_words_of_bash_are_arguments_again(words: list[str], joined: list[str], before: int) -> None:
    environment = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    assert join_words(environment) == before
    assert environment["COMP_WORDS"].split("\n") == joined and environment["COMP_CWORD"] == str(len(joined) - 1)


@pytest.mark.usefixtures("harness")
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_behind_its_own_breaks(tmp_path: Path) -> None:
    """In an interactive bash, for what readline replaces nobody else knows; the command is printed, not run."""
    start = "import sys; sys.argv[0] = 'softprompt'; from app.cli import main; main.main()"
    program = tmp_path / "softprompt"
    program.write_text(
        f"""#!/bin/sh
[ "$_SOFTPROMPT_COMPLETE" ] || {{ echo "<$*>"; exit; }}
exec {sys.executable} -c "{start}"
"""
    )
    program.chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}", "TERM": "dumb"}
    source = environment | {"_SOFTPROMPT_COMPLETE": "source_bash"}
    script = subprocess.run([sys.executable, "-c", start], env=source, capture_output=True, check=True).stdout
    (tmp_path / "script").write_bytes(script)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        env=environment,
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        start_new_session=True,
    ) as bash:
        typed = ("show topic:\t", "batch a b --task=topic@la\t")
        os.write(ours, f"source {tmp_path / 'script'}\n".encode())
        shown = ""
        for count, line in enumerate(typed, 1):
            os.write(ours, f"softprompt {line}\n".encode())
            while shown.count(">") < count:
                shown += os.read(ours, 4096).decode()
        os.write(ours, b"exit\n")
        bash.wait(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert re.findall("<(.*)>", shown) == ["show topic:1", "batch a b --task=topic@latest"]


def test_a_conversation(harness: Harness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOFTPROMPT_CACHE_DIR", str(tmp_path / "cache"))
    assert run("generate", "mood", "-i", stdin="one\n\n \ntwo\n").out == f"{ANSWER}\n" * 2
    assert [call.token_ids for call in harness.engine.calls] == [harness.tokens(text) for text in ("one", "two")]
    assert (tmp_path / "cache" / "history").stat().st_mode & 0o777 == 0o600
    assert f"{ANSWER}\n" in run("generate", "mood", stdin="one\n", terminal=True).out
    done = run("generate", "nothing", "-i", stdin="one\ntwo\n")
    assert done.err.count("error (not_found)") == 2, "an error is not the end of it"


def test_a_terminal_does_not_obey_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\tb\n\x1b[2J日本\u202e"
    assert ask._for_terminal(text) == text, "a file gets it as it is"
    monkeypatch.setattr("sys.stdout", Terminal())
    assert ask._for_terminal(text) == "a\tb\n\\x1b[2J日本\\u202e"


def test_ctrl_c_ends_the_answer_and_not_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = [KeyboardInterrupt(), "one", "two", EOFError()]
    answers: list[str] = []

    def read(_: str = "") -> str:
        line = lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    def answer(_: Any, text: str) -> None:
        answers.append(text)
        if text == "one":
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", read)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", Terminal())
        ask._converse(None, answer)  # type: ignore[arg-type]
    assert answers == ["one", "two"] and lines == []


@pytest.mark.usefixtures("harness")
def test_ctrl_c_elsewhere_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "tasks", interrupted)
    done = run("list", expect=130)
    assert (done.out, done.err) == ("", "")


def test_tables_are_whole_and_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    output.write_table(("name", "what"), [("é" * 70, "x" * 70), ("日本", None)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{'é' * 70}  {'x' * 70}" and lines[2] == "日本" and lines[0].index("what") == 72


def test_the_async_client_does_the_same(serving: tuple[Harness, str], tmp_path: Path) -> None:
    async def use() -> None:
        async with AsyncClient(serving[1]) as client:
            assert (await client.ready()).status == "ready" and (await client.info()).base.name == BASE
            pushed = await client.push("later", peft_folder(tmp_path / "peft", 0.9), alias=None)
            assert pushed.created and (await client.pull("later:1", tmp_path / "out")).digest == pushed.digest
            alias = await client.set_alias("later", "prod", version=1, etag=None)
            assert (await client.alias("later", "prod")).etag == alias.etag
            assert [change.op async for change in client.history("later", page=1)] == ["alias", "publish"]
            tokens = await client.tokenize("hello", with_texts=True)
            assert await client.detokenize(tokens.tokens) == "hello" and len(tokens.token_strs or ()) == tokens.count
            assert [entry async for entry in client.audit()] == []
            generations = [client.generate("later:1", [text]) for text in "abc"]
            assert {found.outputs[0].text for found in await asyncio.gather(*generations)} == {ANSWER}
            with pytest.raises(NotFound):
                await client.task("never")

    asyncio.run(use())


def test_a_manifest_of_another_version_is_not_pulled(
    serving: tuple[Harness, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(serving[1]) as client:
        other = client.version("topic")
        monkeypatch.setattr(type(other), "digest", property(lambda _: "sha256:0"), raising=False)
        with pytest.raises(DigestMismatch):
            client.pull("topic", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
