"""`make gpu-check` runs from end to end, on toy shapes, and tells right from wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from app.engine.decoder import FusedDecoder
from scripts import gpu_check


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    return gpu_check.main()


def test_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = tmp_path / "report.json"
    assert run(monkeypatch, "--tiny", "--json", str(path)) == 0
    results = json.loads(path.read_text())
    assert results["ok"] and results["device"] == "CPU"
    assert len(results["parity"]) == 4 * 2 * 3 and all(check["ok"] for check in results["parity"])
    measured = {(row["name"], row["batch"]) for row in results["decode"]}
    assert {(name, batch) for name in ("reference, eager", "transformers generate") for batch in (1, 8)} <= measured
    assert all(row["ms_per_step"] > 0 and row["share_of_bandwidth"] > 0 for row in results["decode"])
    assert "24 checks, 0 failed" in capsys.readouterr().out


def test_a_wrong_decoder_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "decode_speed", lambda *_: None)
    forward = FusedDecoder.__call__
    monkeypatch.setattr(FusedDecoder, "__call__", lambda self, spans: forward(self, spans).roll(1, dims=0))
    assert run(monkeypatch, "--tiny") == 1


def test_without_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch) == 2
    assert "CUDA" in capsys.readouterr().err
