"""The store's files and log entries: compare-and-swap, damage, leftovers, names, durability."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.errors import InvalidRequest, NotReady, PromptCorrupt, ReferenceNotFound, StorageFull
from app.registry import Store
from app.registry.log import DeleteVersion, Entry, Head, MoveAlias
from app.registry.reference import check_alias_name, check_task_name, parse_reference
from app.registry.task import TaskState

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"tensors", "manifest.json": b"{}"}
HOSTILE_NAMES = [
    "",
    ".",
    "..",
    "../up",
    "a/../b",
    "a/b",
    "/etc",
    "a\\b",
    "%2e%2e%2f",
    "a\x00",
    "a\n",
    "A",
    "é",
    "-rf",
    ".hidden",
    "_x",
    "a b",
    "{{7*7}}",
    "a:b",
    "x" * 65,
    "x" * 1_000_000,
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "prompts")
    store.create("t")
    return store


def append_moves(store: Store, count: int) -> list[Entry]:
    """A log of alias moves; the store does not care that their versions do not exist."""
    head, entries = Head(), []
    for number in range(1, count + 1):
        entries.append(Entry.after(head, MoveAlias(alias="latest", version=number), "someone"))
        assert store.append("t", entries[-1])
        head = entries[-1].head
    return entries


def test_log_reads_back_what_was_appended(store: Store, tmp_path: Path) -> None:
    entries = append_moves(store, 3)
    assert store.read_log("t", 0) == entries
    assert store.read_log("t", 2) == entries[2:]
    assert store.read_log("t", 3) == []
    assert sorted(os.listdir(tmp_path / "prompts/t/log")) == [
        "00000001.json",
        "00000002.json",
        "00000003.json",
    ]
    assert re.fullmatch(rb'\{.*"time": "\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", .*\}\n', entries[0].data)


def test_append_refuses_a_taken_sequence_number(store: Store, tmp_path: Path) -> None:
    mine = Entry.after(Head(), MoveAlias(alias="latest", version=1), "me")
    theirs = Entry.after(Head(), MoveAlias(alias="latest", version=2), "them")
    assert store.append("t", theirs)
    assert not store.append("t", mine)
    assert store.read_log("t", 0) == [theirs]
    assert os.listdir(tmp_path / "prompts/t/log") == ["00000001.json"]


def test_every_flipped_bit_and_every_truncation_of_an_entry_is_noticed() -> None:
    data = Entry.after(Head(), MoveAlias(alias="latest", version=12), "someone").data
    damaged = [data[:length] for length in range(len(data))]
    for position in range(len(data)):
        for bit in range(8):
            damaged.append(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
    for bad in damaged:
        with pytest.raises(ValueError):
            Entry.parse(bad)
    assert Entry.parse(data).change == MoveAlias(alias="latest", version=12)


@pytest.mark.parametrize("lost", [1, 2])
def test_a_missing_entry_is_noticed(store: Store, tmp_path: Path, lost: int) -> None:
    append_moves(store, 3)
    (tmp_path / f"prompts/t/log/{lost:08d}.json").unlink()
    with pytest.raises(PromptCorrupt, match=f"entry {lost} is missing"):
        store.read_log("t", 0)


def test_entries_that_do_not_follow_each_other_do_not_fold() -> None:
    empty = TaskState.empty("t")
    first = Entry.after(Head(), DeleteVersion(version=1), "me")
    other = Entry.after(Head(1, "sha256:" + "0" * 64), DeleteVersion(version=1), "me")
    with pytest.raises(PromptCorrupt, match="entry 1 deletes a version that is absent"):
        empty.fold([first])
    with pytest.raises(PromptCorrupt, match="entry 1 does not follow"):
        empty.fold([other])
    with pytest.raises(PromptCorrupt, match="moves an alias to a version that does not exist"):
        empty.fold([Entry.after(Head(), MoveAlias(alias="a", version=1), "me")])


def test_uploads_take_free_numbers_and_leave_nothing_when_discarded(store: Store, tmp_path: Path) -> None:
    versions = tmp_path / "prompts/t/versions"
    first, second = store.upload("t", FILES), store.upload("t", FILES)
    assert (first.place(()), second.place(())) == (1, 2)
    assert store.read_file("t", 2, "manifest.json") == b"{}"
    assert store.read_file("t", 3, "manifest.json") is None
    # Number 2 was published and deleted by another process meanwhile: it must not be used again.
    assert second.place({1, 2}) == 3
    (versions / "4").write_text("a file of that name")
    assert second.place({3}) == 5
    first.discard()
    second.discard()
    assert os.listdir(versions) == ["4"]


def test_unknown_files_are_ignored(store: Store, tmp_path: Path) -> None:
    append_moves(store, 2)
    root = tmp_path / "prompts"
    for name in ("README.md", "t/README.md", "t/log/.tmp-1", "t/log/9.json", "t/log/00000009.json.bak"):
        (root / name).write_text("x")
    (root / "Not A Task").mkdir()
    (root / "file").write_text("x")
    assert store.tasks() == ["t"]
    assert len(store.read_log("t", 0)) == 2


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: ascii(name[:20]))
def test_hostile_names_never_become_paths(store: Store, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[Any] = []
    entry = Entry.after(Head(), DeleteVersion(version=1), "me")
    attempts: list[Callable[[], Any]] = [
        lambda: store.create(name),
        lambda: store.append(name, entry),
        lambda: store.read_log(name, 0),
        lambda: store.upload(name, FILES),
        lambda: store.read_file(name, 1, "manifest.json"),
        lambda: store.remove_version(name, 1),
        lambda: parse_reference(name),
        lambda: parse_reference(f"{name}:1"),
        lambda: parse_reference(f"t@{name}"),
    ]
    for attempt in attempts:
        with monkeypatch.context() as patch:
            for function in ("open", "mkdir", "link", "rename", "listdir", "stat", "lstat"):
                patch.setattr(os, function, lambda *args, **_: touched.append(args))
            with pytest.raises(ReferenceNotFound):
                attempt()
    assert touched == []
    for check in (check_task_name, check_alias_name):
        with pytest.raises(InvalidRequest):
            check(name)


@pytest.mark.parametrize(
    "text",
    [
        "t:0",
        "t:01",
        "t:-1",
        "t:",
        "t:1.0",
        "t:\u0661",
        "t:" + "9" * 5000,
        "t@",
        "t@7",
        "t@A",
        "t@a@b",
        "t:1@a",
    ]
    + ["t@sha256:" + "0" * 63, "t@sha256:" + "A" * 64, "t@md5:" + "0" * 64, " t", "t ", "t:1\n"],
)
def test_malformed_references_look_like_unknown_ones(text: str) -> None:
    with pytest.raises(ReferenceNotFound) as malformed:
        parse_reference(text)
    assert malformed.value.message == "there is no such task, version, alias or file"


def test_references_of_every_form() -> None:
    digest = "sha256:" + "0a" * 32
    forms = {"t": "latest", "t:7": 7, "t@prod": "prod", f"t@{digest}": digest, "a.b-c_1@v2": "v2"}
    for text, expected in forms.items():
        found = parse_reference(text)
        assert found.task == re.split("[:@]", text)[0]
        assert [part for part in (found.version, found.alias, found.digest) if part is not None] == [expected]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EIO, NotReady),
        (errno.EROFS, NotReady),
    ],
)
def test_failures_of_the_file_system_name_the_cause_and_no_path(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path))

    monkeypatch.setattr(os, "fsync", fail)
    entry = Entry.after(Head(), DeleteVersion(version=1), "me")
    for write in (
        store.upload("t", FILES).write,
        lambda: store.append("t", entry),
        lambda: store.create("u"),
    ):
        with pytest.raises(expected, match=os.strerror(number)) as caught:
            write()
        assert str(tmp_path) not in str(caught.value)
    monkeypatch.undo()
    assert os.listdir(tmp_path / "prompts/t/versions") == os.listdir(tmp_path / "prompts/t/log") == []


def test_everything_is_synced_before_an_entry_names_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power loss takes what was not synced: so files come before their folder, and folders before the entry."""
    trace: list[str] = []
    random_name = re.compile(r"\.tmp-\w+")

    def short(path: Any) -> str:
        return random_name.sub("TMP", str(Path(path).relative_to(tmp_path)))

    def traced(function: Callable[..., Any], say: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            trace.append(say(*args))
            return function(*args)

        return call

    say_sync = lambda fd: f"sync {short(os.readlink(f'/proc/self/fd/{fd}'))}"  # noqa: E731
    monkeypatch.setattr(os, "fsync", traced(os.fsync, say_sync))
    monkeypatch.setattr(os, "rename", traced(os.rename, lambda a, b: f"rename {short(a)} {short(b)}"))
    monkeypatch.setattr(os, "link", traced(os.link, lambda a, b: f"link {short(a)} {short(b)}"))
    store.create("new")
    store.upload("new", FILES).place(())
    assert store.append("new", Entry.after(Head(), MoveAlias(alias="latest", version=1), "me"))
    assert trace == [
        "sync prompts/new",
        "sync prompts",
        "sync .",
        *(f"sync prompts/new/versions/TMP/{name}" for name in FILES),
        "sync prompts/new/versions/TMP",
        "rename prompts/new/versions/TMP prompts/new/versions/1",
        "sync prompts/new/versions",
        "sync prompts/new/log/TMP",
        "link prompts/new/log/TMP prompts/new/log/00000001.json",
        "sync prompts/new/log",
    ]
