"""guidellm: load by somebody else's generator, with synthetic texts, so that nothing is fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Server

CLIENT = "guidellm"
NUM_REQUESTS = 16
OUTPUT_TOKENS = 12


@pytest.mark.parametrize(
    ("route", "model"),
    [("/v1/completions", "sentiment_mixed"), ("/v1/chat/completions", "smollm2-135m-instruct")],
    ids=["completions", "chat"],
)
def test_load(server: Server, tmp_path: Path, route: str, model: str) -> None:
    """guidellm benchmark, synthetic texts: no request fails, every token is counted"""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "guidellm", "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={server.address},model={model},request_format={route}"),
            *("--tokenizer", f"kind=huggingface_auto,model={server.tokenizer}"),
            *("--data", f"kind=synthetic_text,prompt_tokens=24,output_tokens={OUTPUT_TOKENS}"),
            *("--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
            *("--output", f"kind=json,path={report}"),
        ],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    [benchmark] = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    requests = benchmark["requests"]
    assert not requests["errored"] and len(requests["successful"]) == NUM_REQUESTS
    assert all(request["output_tokens"] == OUTPUT_TOKENS for request in requests["successful"])
