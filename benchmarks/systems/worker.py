"""What every worker shares: one line of JSON in, one run, one line of JSON out.

A worker loads its system once and prints `{"ready": ...}`; the driver stops (SIGSTOP) it while others run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.workload import Spec, Work, Workload

SHOWN_TOKENS = 8  # of each answer, for the comparison between systems


class Trace:
    """When each answer began and what it says. Create it when the first request is submitted."""

    def __init__(self, num_requests: int) -> None:
        self.began = time.perf_counter()
        self._submitted = [self.began] * num_requests
        self._ttft: list[float | None] = [None] * num_requests
        self.answers: list[list[int]] = [[] for _ in range(num_requests)]

    def submit(self, index: int) -> None:
        """For a request that waited at the client until an earlier one had ended."""
        self._submitted[index] = time.perf_counter()

    def token(self, index: int, *ids: int) -> None:
        """Tokens of an answer have arrived."""
        self.first(index)
        self.answers[index].extend(ids)

    def first(self, index: int) -> None:
        """The first token of an answer is there, for systems that hand over their tokens at the end."""
        if self._ttft[index] is None:
            self._ttft[index] = time.perf_counter() - self._submitted[index]

    def first_of_all(self) -> None:
        for index in range(len(self._ttft)):
            self.first(index)

    def result(self) -> dict[str, Any]:
        """Call it at the very end: it stops the clock."""
        return {
            "seconds": time.perf_counter() - self.began,
            "tokens": sum(map(len, self.answers)),
            "ttft": self._ttft,
            "token_counts": sorted({len(answer) for answer in self.answers}),
            "check": [answer[:SHOWN_TOKENS] for answer in self.answers[:64]],
        }


class Worker(ABC):
    """One system, loaded."""

    works: tuple[Work, ...] = ("generate",)

    def __init__(self, arguments: argparse.Namespace, workload: Workload) -> None:
        self.arguments = arguments
        self.workload = workload

    def ready(self) -> dict[str, Any]:
        """Versions and settings worth a line in the report; `weight_bytes` are read once per decode step."""
        return {}

    @abstractmethod
    def run(self, spec: Spec) -> dict[str, Any]:
        """One run; what a client would have at hand beforehand (tensors, bodies) is prepared outside its clock."""

    def close(self) -> None:  # noqa: B027 - most need none
        """End what the worker started."""


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="Transformers folder, or GGUF file for llama.cpp")
    parser.add_argument("--workload", type=Path, required=True, help="Folder that workload.prepare wrote")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kv-cache-tokens", type=int, help="Capacity of this engine's KV cache")
    parser.add_argument("--quantization", help="Of this engine")
    return parser


def die_with_parent() -> None:
    """A driver that was killed leaves workers that are stopped and would stay for ever (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def serve(build: Callable[[argparse.Namespace, Workload], Worker]) -> None:
    """The loop; returns when the driver closes the pipe."""
    # Libraries write to standard output as they like: what they write goes to the log, the protocol keeps its own.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    die_with_parent()
    arguments = arguments_parser().parse_args()
    worker = build(arguments, Workload(arguments.workload))
    try:
        replies.write(json.dumps({"ready": worker.ready()}) + "\n")
        for line in sys.stdin:
            try:
                spec = Spec.of(json.loads(line))
                if spec.work not in worker.works:
                    raise NotImplementedError(f"this system does not do {spec.work!r}")
                reply = worker.run(spec)
            except Exception as error:
                traceback.print_exc()
                reply = {"error": f"{type(error).__name__}: {error}"}
            replies.write(json.dumps(reply) + "\n")
    finally:
        worker.close()
