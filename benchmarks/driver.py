"""Starts workers, lets one of them run at a time, and interleaves them: A B A B."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from benchmarks.systems import GGUF, SYSTEMS
from benchmarks.workload import Spec

ROOT = Path(__file__).parent.parent
WARMUP_TOKENS = 8
RUN_TIMEOUT = 1800.0


class WorkerFailed(Exception):
    """A run that a system cannot do, or a worker that died."""


@dataclass
class Options:
    """What all workers of one measurement share."""

    model: Path
    workload: Path
    threads: int
    logs: Path
    kv_cache_tokens: int | None = None


@dataclass
class Process:
    """One worker. It and its children are stopped (SIGSTOP) unless it is its turn: an idle server may still spin."""

    name: str
    options: Options
    ready: dict[str, Any] = field(default_factory=dict)

    def start(self) -> Self:
        system = SYSTEMS[self.name]
        model = str(self.options.model)
        if system.gguf:
            model = os.environ.get(GGUF) or sys.exit(f"set {GGUF} to the GGUF file; benchmarks/peers.sh fetches it")
        shared = ["--model", model, "--workload", str(self.options.workload), "--threads", str(self.options.threads)]
        if self.options.kv_cache_tokens is not None:
            shared += ["--kv-cache-tokens", str(self.options.kv_cache_tokens)]
        self._log = self.options.logs / f"{self.name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [system.interpreter(), "-m", f"benchmarks.systems.{system.module}", *shared, *system.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(self.options.threads), "HF_HUB_OFFLINE": "1"},
                start_new_session=True,  # a process group of its own, to stop and to end as one
            )
        begin = time.perf_counter()
        self.ready = self._read()["ready"] | {"start_seconds": round(time.perf_counter() - begin, 1)}
        self._signal(signal.SIGSTOP)
        return self

    def run(self, spec: Spec) -> dict[str, Any]:
        """Raises WorkerFailed."""
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(asdict(spec)) + "\n")
            self._process.stdin.flush()
            reply = self._read()
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in reply:
            raise WorkerFailed(f"{self.name}: {reply['error']} (see {self._log})")
        return reply

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        self._signal(signal.SIGKILL)  # children that outlived it
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text(errors="replace").splitlines()[-15:]
            raise WorkerFailed("\n".join([f"{self.name} died; the end of {self._log}:", *tail]))
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass  # it has died; reading from it will say so


@dataclass(frozen=True)
class Point:
    """One setting to measure, and the coordinates that name it in tables and plots."""

    key: dict[str, Any]
    spec: Spec
    cold: bool = False  # new soft prompts in every run


def measure(systems: Sequence[str], points: Sequence[Point], repeats: int, options: Options) -> dict[str, Any]:
    """Run every system at every point `repeats` times, in turn. Returns `ready` of each system, and all runs."""
    workers: list[Process] = []
    runs: list[dict[str, Any]] = []
    try:
        for name in systems:
            say(f"starting {name}")
            workers.append(Process(name, options).start())
        seeds = iter(range(1, sys.maxsize))
        for point in points:
            able = [worker for worker in workers if _warm_up(worker, point, next(seeds))]
            for repeat in range(repeats):
                seed = next(seeds)  # the same for every system: same texts, same answers
                spec = replace(point.spec, text_seed=seed, prompt_seed=seed if point.cold else 0)
                for worker in able:
                    reply = worker.run(spec)
                    runs.append({"system": worker.name, **point.key, "repeat": repeat, "requests": spec.num_requests})
                    runs[-1] |= reply
                    say(f"  {_show(point.key)} {worker.name}: {reply['tokens'] / reply['seconds']:.1f} tok/s")
    finally:
        for worker in workers:
            worker.close()
    return {"systems": {worker.name: worker.ready for worker in workers}, "runs": runs}


def _warm_up(worker: Process, point: Point, seed: int) -> bool:
    """Once per point: soft prompts become resident, kernels for these shapes get compiled."""
    tokens = min(point.spec.new, WARMUP_TOKENS)
    try:
        # The number of requests is that of the measurement, so that every task has had its turn.
        worker.run(replace(point.spec, new=tokens, text_seed=seed, prompt_seed=seed if point.cold else 0))
    except WorkerFailed as error:
        say(f"  left out at {_show(point.key)}: {error}")
        return False
    return True


def _show(key: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in key.items())


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def temporary_logs() -> Path:
    return Path(tempfile.mkdtemp(prefix="softprompt-bench-"))
