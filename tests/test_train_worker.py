"""What the process of a job does, in this process: it checks, trains, stops and goes on, and says how it ended."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file

from app.errors import InvalidRecipe, TrainingFailed
from app.train import worker
from app.train.check import BadData
from tests.jobs_harness import ROWS, jsonl
from tests.tiny import tiny_base

BASE = tiny_base("llama")
RECIPE = {"num_virtual_tokens": 4, "max_steps": 12, "warmup_steps": 2, "eval_every": 4, "batch_size": 8}


class Told(list[dict[str, Any]]):
    def __call__(self, kind: str, **members: Any) -> None:
        self.append({"kind": kind, **json.loads(json.dumps(members))})


class StopAt:
    """Stops at the n-th time it is asked."""

    def __init__(self, number: int = 10**9) -> None:
        self.left = number

    def check(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise worker.Stopped


def order(folder: Path, **changes: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    (folder / "training.jsonl").write_bytes(jsonl(changes.pop("rows", ROWS)))
    options = {"recipe": RECIPE, "num_epochs": None, "template": None, "classify": None} | changes.pop("options", {})
    return {
        "training": str(folder / "training.jsonl"),
        "validation": None,
        "initial": None,
        "work": str(folder / "work"),
        "seed": 3,
        "threads": 1,
        "options": options,
        "base": {
            "path": str(BASE.path),
            "cache_dir": str(BASE.path.parent / "cache"),
            "name": "tiny-llama",
            "fingerprint": BASE.info.fingerprint,
            "max_model_len": 512,
            "device": "cpu",
            "dtype": "float32",
        },
        **changes,
    }


def run(given: dict[str, Any], told: Told | None = None, stop: StopAt | None = None) -> Told:
    told = Told() if told is None else told
    threads = torch.get_num_threads()
    try:
        worker.train_prompt(given, told, stop or StopAt())  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
    return told


def prepared(folder: Path, **changes: Any) -> dict[str, Any]:
    given = order(folder, **changes)
    worker.check(given, Told(), StopAt())  # type: ignore[arg-type]
    return given


def test_check(tmp_path: Path) -> None:
    told = Told()
    given = order(tmp_path / "job", options={"num_epochs": 3})
    worker.check(given, told, StopAt())  # type: ignore[arg-type]
    assert (
        told[-1]["kind"] == "checked" and told[-1]["max_steps"] == 3 * 5 and told[-1]["report"]["training_rows"] == 36
    )
    checked = json.loads((tmp_path / "job/work/checked.json").read_text())
    assert checked["recipe"]["seed"] == 3 and checked["recipe"]["max_steps"] == 15
    assert checked["labels"] == ["negative", "positive"] and checked["template"] == "{input}\n"
    with pytest.raises(BadData):
        worker.check(order(tmp_path / "bad", rows=ROWS[:3]), told, StopAt())  # type: ignore[arg-type]
    assert not (tmp_path / "bad/work").exists()
    with pytest.raises(InvalidRecipe, match="come to"):
        worker.check(order(tmp_path / "x", options={"num_epochs": 10**6}), told, StopAt())  # type: ignore[arg-type]
    with pytest.raises(InvalidRecipe, match="no room"):
        recipe = {**RECIPE, "num_virtual_tokens": 511}
        worker.check(order(tmp_path / "y", options={"recipe": recipe}), told, StopAt())  # type: ignore[arg-type]
    with pytest.raises(worker.Stopped):
        worker.check(order(tmp_path / "z"), told, StopAt(1))  # type: ignore[arg-type]


def test_train_stop_and_go_on_to_the_same_result(tmp_path: Path) -> None:
    whole, torn = (prepared(tmp_path / name) for name in ("whole", "torn"))
    told = run(whole)
    steps = [message for message in told if message["kind"] == "step"]
    assert [step["step"] for step in steps if step["validation_loss"] is not None] == [4, 8, 12]
    parts = Told()
    for number in (5, 2):
        with pytest.raises(worker.Stopped):
            run(torn, parts, StopAt(number))
    run(torn, parts)
    finals = [list_[-1]["report"] for list_ in (told, parts)]
    assert finals[0]["steps"] == finals[1]["steps"] == 12 and finals[0]["curve"] == finals[1]["curve"]
    tensors = [load_file(tmp_path / name / "work/out/adapter_model.safetensors") for name in ("whole", "torn")]
    assert torch.equal(tensors[0]["prompt_embeddings"], tensors[1]["prompt_embeddings"])
    again = run(torn)
    assert [message["kind"] for message in again] == ["alive", "alive", "trained"], "what is finished is not done twice"
    assert PeftConfig.from_pretrained(str(tmp_path / "whole/work/out")).num_virtual_tokens == 4


def test_it_starts_from_another_prompt(tmp_path: Path) -> None:
    initial = torch.full((4, 32), 0.01)
    save_file({"prompt": initial}, tmp_path / "initial.safetensors")
    recipe = {**RECIPE, "max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-8}
    run(prepared(tmp_path / "job", options={"recipe": recipe}, initial=str(tmp_path / "initial.safetensors")))
    found = load_file(tmp_path / "job/work/out/adapter_model.safetensors")["prompt_embeddings"]
    assert torch.allclose(found, initial, atol=1e-6)


def test_rows_of_several_tasks(tmp_path: Path) -> None:
    other = {"negative": "no", "positive": "yes"}
    rows = [{**row, "task": "b"} for row in ROWS] + [
        {**row, "task": "a", "target": other[row["target"]]} for row in ROWS
    ]
    recipe = {**RECIPE, "method": "multitask_prompt_tuning", "max_steps": 3, "warmup_steps": 0}
    for wanted, found, labels in ((None, "a", ["no", "yes"]), ("b", "b", ["negative", "positive"])):
        given = prepared(tmp_path / f"job-{found}", rows=rows, options={"recipe": recipe, "for_task": wanted})
        checked = json.loads((tmp_path / f"job-{found}/work/checked.json").read_text())
        assert checked["task"] == found and checked["labels"] == labels
    told = run(given)
    assert told[-1]["report"]["tasks"] == ["a", "b"]
    tensors = load_file(tmp_path / "job-b/work/out/adapter_model.safetensors")
    assert tensors["prefix_task_cols"].shape == (2, 4, 1)
    with pytest.raises(InvalidRecipe, match="has this task"):
        prepared(tmp_path / "bad", rows=rows, options={"recipe": recipe, "for_task": "c"})


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    given = prepared(tmp_path / "job")
    given["base"] = {**given["base"], "fingerprint": "sha256:other"}
    with pytest.raises(TrainingFailed, match="have changed"):
        run(given)


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (worker.Stopped(), {"kind": "stopped"}),
        (OSError(errno.ENOSPC, "No space left on device"), {"kind": "full"}),
        (worker.SafetensorError("I/O error: No space left on device"), {"kind": "full"}),
        (MemoryError(), {"kind": "failed", "code": "out_of_memory"}),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), {"kind": "failed", "code": "out_of_memory"}),
        (TrainingFailed("the loss is not finite"), {"kind": "failed", "code": "training_failed"}),
        (InvalidRecipe("no", param="n_epochs"), {"kind": "refused", "code": "invalid_recipe", "param": "n_epochs"}),
        (
            BadData("bad", param="validation_file", problems=[], counts={}),
            {"kind": "refused", "code": "invalid_validation_file", "param": "validation_file"},
        ),
        (OSError(errno.EIO, "I/O error"), None),
        (RuntimeError("a bug"), None),
    ],
    ids=repr,
)
def test_how_it_says_that_it_ended(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, last: dict[str, Any] | None
) -> None:
    told = Told()

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(worker, "_own_output", lambda: told)
    monkeypatch.setattr(worker, "Stop", StopAt)
    monkeypatch.setattr(worker, "_die_with_the_server", lambda: None)
    monkeypatch.setattr(worker, "check", fail)
    monkeypatch.setattr("sys.stdin", type("Input", (), {"buffer": __import__("io").BytesIO(b'{"action": "check"}\n')}))
    if last is None:
        with pytest.raises(type(error)):
            worker.main()
        assert not told
    else:
        assert worker.main() == 0
        assert last.items() <= told[-1].items() and len(told) == 1
