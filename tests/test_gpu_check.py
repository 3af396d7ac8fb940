"""`make gpu-check` runs from end to end, on toy shapes, and tells right from wrong."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.engine.attention_check import Faulty, Unavailable
from app.engine.decoder import FusedDecoder
from app.engine.local import LocalEngine
from scripts import gpu_check, gpu_engine, gpu_parity, gpu_speed
from scripts.gpu_common import Machine, Report, decoder_of, largest_logit, worst

NAN, INF = torch.nan, torch.inf


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    return gpu_check.main()


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_parity, "DECODED", 5)  # steps take most of the time


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Toy shapes, one model only, and no long rows; `test_tiny` has them all."""
    found, rows = gpu_parity.configurations, gpu_parity.make_rows
    monkeypatch.setattr(gpu_parity, "configurations", lambda machine: {"llama": found(machine)["llama"]})
    monkeypatch.setattr(gpu_parity, "make_rows", lambda model: rows(model)[:4])
    return Machine(torch.device("cpu"), tiny=True, deadline=INF)


def failed(report: Report) -> list[str]:
    return [check["name"] for check in report.results["parity"] if not check["ok"]]


def test_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    assert run(monkeypatch, "--tiny", "--json", str(path)) == 0
    results = json.loads(path.read_text())
    assert results["ok"] and results["device"] == "CPU"
    # Three of the logits for each model and type, two of the engine.
    assert len(results["parity"]) == 4 * 2 * 3 + 2 * 2 * 2 and all(check["ok"] for check in results["parity"])
    measured = {(row["name"], row["batch"]) for row in results["decode"]}
    names = ("reference, eager", "engine", "transformers generate")
    assert measured == {(name, batch) for name in names for batch in (1, 8)}
    assert all(row["ms_per_step"] > 0 and row["share_of_bandwidth"] > 0 for row in results["decode"])
    assert "32 checks, 0 failed" in capsys.readouterr().out


def test_without_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 2
    assert "CUDA" in capsys.readouterr().err


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_worst_sees_what_is_not_a_number() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert worst([(zero, zero), (one, zero)]) == 1
    assert worst([(one, zero), (torch.tensor([0.0, NAN, 0.0]), zero), (one, zero)]) == INF  # max() would say 1
    assert worst([(torch.full((3,), INF), torch.full((3,), INF))]) == INF
    assert worst([]) == INF == worst([(torch.zeros(0), torch.zeros(0))])
    assert largest_logit([one, 5 * one, one]) == 5
    assert largest_logit([one, NAN * one, one]) == INF


def spoiled(row: int, change: Callable[[torch.Tensor], Any]) -> Callable[..., torch.Tensor]:
    """A decoder that is wrong about one span of each step that has as many, and knows nothing else about it."""
    forward = FusedDecoder.__call__

    def call(self: FusedDecoder, spans: Any) -> torch.Tensor:
        logits = forward(self, spans)
        if len(spans) > row:
            start = sum(span.num_logits for span in spans[:row])
            change(logits[start : start + spans[row].num_logits])
        return logits

    return call


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("value", [NAN, 3.0])
def test_a_wrong_row_fails(machine: Machine, monkeypatch: pytest.MonkeyPatch, row: int, value: float) -> None:
    monkeypatch.setattr(FusedDecoder, "__call__", spoiled(row, lambda logits: logits.add_(value)))
    report = Report()
    gpu_parity.parity(machine, report)
    assert {"llama, float32, reference, eager", "llama, bfloat16, reference, eager"} <= set(failed(report))


def test_an_oracle_of_nan_fails(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinite error of transformers' own must not make every error of ours acceptable."""
    oracle = gpu_parity.oracle

    def broken(*arguments: Any) -> Any:
        model, rows, own, truth = oracle(*arguments)
        return model, rows, own, [truth[0], torch.full_like(truth[1], NAN), *truth[2:]]

    monkeypatch.setattr(gpu_parity, "oracle", broken)
    report = Report()
    gpu_parity.parity(machine, report)
    assert len(failed(report)) == 6 == report.failures


# -- kernels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "num_failed"),
    [(Unavailable("not installed"), 0), (Faulty("differs by 3"), 2), (RuntimeError("illegal access"), 2)],
)
def test_a_kernel_that_exists_must_work(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, error: Exception, num_failed: int
) -> None:
    def choose(model: Any, kind: str, **options: Any) -> Any:
        if kind == "varlen":
            raise error
        return decoder_of(model, kind, **options)

    monkeypatch.setattr(gpu_parity, "decoder_of", choose)
    report = Report()
    gpu_parity.parity(machine, report)
    assert len(failed(report)) == num_failed and all("varlen" in name for name in failed(report))


@pytest.mark.parametrize(("error", "num_failed"), [(Unavailable("not installed"), 0), (Faulty("differs by 3"), 1)])
def test_a_kernel_that_exists_must_run_fast(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, error: Exception, num_failed: int
) -> None:
    def choose(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(gpu_speed, "decoder_of", choose)
    monkeypatch.setattr(gpu_speed, "engine_speed", lambda *_: None)
    monkeypatch.setattr(gpu_speed, "generate_speed", lambda *_: None)
    report = Report()
    gpu_speed.decode_speed(machine, report)
    assert len(failed(report)) == num_failed


def test_a_card_needs_a_kernel_that_was_right() -> None:
    report = Report()
    gpu_parity.require_kernels(report, {("varlen", False), ("flashinfer", True)})
    assert report.ok
    gpu_parity.require_kernels(report, {("varlen", False)})
    assert failed(report) == ["a kernel in bfloat16, as graphs"]


def test_graphs_that_were_given_up_fail(machine: Machine) -> None:
    config = gpu_parity.configurations(machine)["llama"]
    model = gpu_parity.oracle(config, torch.float32, machine.device)[0]
    forward, _ = decoder_of(model, "reference", block_size=16, num_tokens=64, max_model_len=64, graphs=False)
    report = Report()
    gpu_parity.check_graphs(report, "x", forward)
    assert failed(report) == ["x: captured"] and "graphs off" in report.results["parity"][0]["reason"]


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [16, 256])
def test_engine(machine: Machine, monkeypatch: pytest.MonkeyPatch, block_size: int) -> None:
    for module in ("scripts.gpu_engine", "app.engine.loaded_model"):
        monkeypatch.setattr(f"{module}.preferred_block_size", lambda *_, **__: block_size)
    report = Report()
    gpu_engine.engine_parity(machine, report, gpu_parity.configurations(machine))
    assert report.ok and len(report.results["parity"]) == 4


def test_an_engine_that_mixes_rows_up_fails(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = LocalEngine.generate
    monkeypatch.setattr(
        LocalEngine, "generate", lambda self, _, *rest, **options: generate(self, None, *rest, **options)
    )
    report = Report()
    gpu_engine.engine_parity(machine, report, gpu_parity.configurations(machine))
    assert set(failed(report)) == {
        f"engine, llama, {dtype}: {what}"
        for dtype in ("float32", "bfloat16")
        for what in ("greedy", "soft prompts left the cache and came back")
    }


def test_an_engine_that_raises_fails(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalEngine, "start", lambda _: 1 / 0)
    report = Report()
    gpu_engine.engine_parity(machine, report, gpu_parity.configurations(machine))
    assert failed(report) == ["engine, llama, float32", "engine, llama, bfloat16"]


# -- time --------------------------------------------------------------------------------------------------------------


def test_what_was_not_checked_is_not_right(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert not Report().ok  # nothing was
    assert run(monkeypatch, "--tiny", "--seconds", "0") == 1
    out = capsys.readouterr().out
    assert "FAIL llama, float32: no time for it" in out and "FAIL engine, llama, float32: no time for it" in out


def test_late_between_two_kernels(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr(Machine, "is_late", lambda *_: next(answers, True))
    report = Report()
    gpu_parity.parity(machine, report)
    assert failed(report) == [f"llama, float32, {kind}, eager" for kind in ("flashinfer", "varlen", "triton")] + [
        "llama, bfloat16"
    ]


def test_what_hangs_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, report = tmp_path / "report.json", Report()
    report.check("first", True)
    statuses, ended = [], threading.Event()
    monkeypatch.setattr("os._exit", lambda status: (statuses.append(status), ended.set()))
    with gpu_check.watchdog(report, path, 0.2):
        assert ended.wait(50)
    assert statuses == [1] and "2 checks, 1 failed" in capsys.readouterr().out
    results = json.loads(path.read_text())
    assert not results["ok"] and [check["name"] for check in results["parity"]] == ["first", "in time"]
