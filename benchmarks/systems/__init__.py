"""The systems that can be measured, one worker process each, all speaking the protocol of `worker`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """How to start one worker. `python` names the environment variable that holds its interpreter."""

    module: str
    arguments: tuple[str, ...] = ()
    python: str | None = None  # None: the interpreter that runs the driver
    exact: bool = True  # computes in float32, so its greedy tokens must agree with the others'
    gguf: bool = False  # reads the GGUF file instead of the transformers folder

    def interpreter(self) -> str:
        if self.python is None:
            return sys.executable
        path = os.environ.get(self.python)
        if not path:
            raise SystemExit(f"set {self.python} to the Python of its environment; benchmarks/peers.sh makes it")
        return path


VLLM = "BENCH_VLLM_PYTHON"
LLAMA = "BENCH_LLAMA_PYTHON"
GGUF = "BENCH_GGUF"  # the file's path

SYSTEMS = {
    "ours-fp32": System("ours"),
    "ours-int8": System("ours", ("--quantization", "int8"), exact=False),
    "peft": System("peft_serial"),
    "transformers": System("transformers_generate"),
    "vllm": System("vllm_offline", python=VLLM),
    "llama.cpp": System("llama_cpp_batch", python=LLAMA, exact=False, gguf=True),
    "http-ours-fp32": System("http_ours"),
    "http-ours-int8": System("http_ours", ("--quantization", "int8"), exact=False),
    "http-vllm": System("http_vllm", python=VLLM),
}
