"""lm-evaluation-harness as its command line is used, held to our own scoring of the same rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Server, rows, write_rows

CLIENT = "lm_eval"
TASKS = Path(__file__).resolve().parent / "lm_eval"


def evaluate(server: Server, folder: Path, reference: str, task: str, *options: str) -> float:
    """What lm-eval's report says of `task`, run in `folder`, where its rows lie."""
    model_args = [f"model={reference}", f"base_url={server.url}/completions", f"tokenizer={server.tokenizer}"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"),
            *("--model_args", ",".join([*model_args, "num_concurrent=4", "max_retries=1", *options])),
            *("--tasks", task, "--include_path", str(TASKS), "--output_path", "out", "--batch_size", "4"),
        ],
        cwd=folder,
        env=os.environ | {"HF_HOME": str(folder / "hub")},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [report] = folder.glob("out/**/results_*.json")
    scores = json.loads(report.read_text(encoding="utf-8"))["results"][task]
    report.unlink()
    [score] = [value for name, value in scores.items() if name.split(",")[0] in ("acc", "exact_match")]
    return float(score)


@pytest.mark.parametrize("options", [(), ("tokenized_requests=False",)], ids=["token ids", "texts"])
def test_loglikelihood(server: Server, tmp_path: Path, options: tuple[str, ...]) -> None:
    """local-completions, multiple choice by loglikelihood: the accuracy of `softprompt eval`"""
    data = write_rows(tmp_path / "sentiment.jsonl", rows("sentiment_mixed", 60))
    ours = server.softprompt("eval", "sentiment_mixed:1", "--data", str(data), "--json")
    accuracy = ours["evaluation"]["scores"]["accuracy"]
    assert evaluate(server, tmp_path, "sentiment_mixed:1", "sentiment", *options) == pytest.approx(accuracy, abs=1e-4)
    assert 0.85 < accuracy < 1


def test_generate_until(server: Server, tmp_path: Path) -> None:
    """local-completions, generate_until: the exact match of `softprompt eval`"""
    data = write_rows(tmp_path / "address.jsonl", rows("address_parse", 50))
    ours = server.softprompt("eval", "address_parse:1", "--data", str(data), "--json")
    found = evaluate(server, tmp_path, "address_parse:1", "address")
    assert found == pytest.approx(ours["evaluation"]["scores"]["exact_match"], abs=1e-4)
    assert 0.2 < found < 0.8
