"""Starts workers, lets one of them run at a time, and interleaves them: A B C, B C A, C A B."""

from __future__ import annotations

import json
import os
import select
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
TIMEOUT = 1800.0  # seconds, of a start and of a run


class WorkerFailed(Exception):
    """A run that a system cannot do."""


class WorkerDied(WorkerFailed):
    """It ended, or had to be ended; there is nothing more to ask it."""


@dataclass
class Options:
    """What all workers of one measurement share."""

    model: Path
    workload: Path
    threads: int
    logs: Path
    kv_cache_tokens: int | None = None
    timeout: float = TIMEOUT


@dataclass
class Process:
    """One worker. It and its children are stopped (SIGSTOP) unless it is its turn: an idle server may still spin."""

    name: str
    options: Options
    ready: dict[str, Any] = field(default_factory=dict)
    is_alive: bool = False

    def command(self) -> list[str]:
        system = SYSTEMS[self.name]
        model = str(self.options.model)
        if system.gguf:
            model = os.environ.get(GGUF) or sys.exit(f"set {GGUF} to the GGUF file; benchmarks/peers.sh fetches it")
        shared = ["--model", model, "--workload", str(self.options.workload), "--threads", str(self.options.threads)]
        if self.options.kv_cache_tokens is not None:
            shared += ["--kv-cache-tokens", str(self.options.kv_cache_tokens)]
        return [system.interpreter(), "-m", f"benchmarks.systems.{system.module}", *shared, *system.arguments]

    def start(self) -> Self:
        """Raises WorkerDied."""
        command = self.command()
        self._log = self.options.logs / f"{self.name}.log"
        self._unread = b""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,  # so that `select` sees all that is there
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(self.options.threads), "HF_HUB_OFFLINE": "1"},
                start_new_session=True,  # a process group of its own, to stop and to end as one
            )
        self.is_alive = True
        begin = time.perf_counter()
        self.ready = self._read()["ready"] | {"start_seconds": round(time.perf_counter() - begin, 1)}
        self._signal(signal.SIGSTOP)
        return self

    def run(self, spec: Spec) -> dict[str, Any]:
        """Raises WorkerFailed."""
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(asdict(spec)).encode() + b"\n")
            reply = self._read()
        except BrokenPipeError:
            raise self._died("has died") from None
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in reply:
            raise WorkerFailed(f"{self.name}: {reply['error']} (see {self._log})")
        return reply

    def close(self) -> None:
        """Idempotent."""
        if not self.is_alive:
            return
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        self._kill()

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)  # its children too
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self.is_alive = False

    def _died(self, how: str) -> WorkerDied:
        self._kill()
        tail = self._log.read_text(errors="replace").splitlines()[-15:]
        return WorkerDied("\n".join([f"{self.name} {how}; the end of {self._log}:", *tail]))

    def _read(self) -> dict[str, Any]:
        """One line, or the worker's end."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + self.options.timeout
        while b"\n" not in self._unread:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise self._died(f"was ended after {self.options.timeout:.0f} s without an answer")
            data = os.read(self._process.stdout.fileno(), 1 << 20)
            if not data:
                raise self._died("has died")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
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

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.key.items())


def schedule(num_systems: int, num_points: int, repeats: int) -> list[tuple[int, int, int]]:
    """(repeat, point, system): points in turn within a repeat, and at each the systems, a place further each time."""
    return [
        (repeat, point, (repeat + place) % num_systems)
        for repeat in range(repeats)
        for point in range(num_points)
        for place in range(num_systems)
    ]


def measure(
    systems: Sequence[str], points: Sequence[Point], repeats: int, options: Options, *, interleave: bool = False
) -> dict[str, Any]:
    """Run every system at every point `repeats` times, in turn; with `interleave` the points take turns as well.

    Returns `ready` of each system, all runs, and what went wrong.
    """
    workers: list[Process] = []
    runs: list[dict[str, Any]] = []
    failures: list[str] = []
    left_out: list[str] = []
    seeds = iter(range(1, sys.maxsize))

    def attempt(worker: Process, point: Point, spec: Spec, missing: list[str]) -> dict[str, Any] | None:
        """None for a worker that could not do it, which `missing` then says."""
        if not worker.is_alive:
            return None
        try:
            return worker.run(spec)
        except WorkerFailed as error:
            say(f"  {point}: {error}")
            (failures if isinstance(error, WorkerDied) else missing).append(f"{worker.name} at {point}: {error}")
            return None

    try:
        for name in systems:
            say(f"starting {name}")
            workers.append(Process(name, options))
            workers[-1].start()
        for group in [points] if interleave else [[point] for point in points]:
            able = {
                (index, worker.name)
                for index, point in enumerate(group)
                for worker in workers
                if attempt(worker, point, warm_up(point, next(seeds)), left_out) is not None
            }
            # The same seed for every system, so the same texts and answers; another for every point: caches know texts.
            drawn = [[next(seeds) for _ in group] for _ in range(repeats)]
            for repeat, index, place in schedule(len(workers), len(group), repeats):
                point, worker, seed = group[index], workers[place], drawn[repeat][index]
                if (index, worker.name) not in able:
                    continue
                spec = replace(point.spec, text_seed=seed, prompt_seed=seed if point.cold else 0)
                reply = attempt(worker, point, spec, failures)
                if reply is not None:
                    order = {"system": worker.name, **point.key, "repeat": repeat, "requests": spec.num_requests}
                    runs.append(order | {"new": spec.new} | reply)
                    say(f"  {point} {worker.name}: {reply['seconds']:.3f} s, {reply['tokens']} tokens")
    finally:
        for worker in workers:
            worker.close()
    return {
        "systems": {worker.name: worker.ready for worker in workers},
        "runs": runs,
        "interleaved": interleave,
        "failures": failures,
        "left_out": left_out,
    }


def warm_up(point: Point, seed: int) -> Spec:
    """Once per point: soft prompts become resident, kernels for these shapes get compiled, memory is set aside.

    The number of requests is that of the measurement, so that every task has had its turn.
    """
    new = min(point.spec.new, WARMUP_TOKENS)
    return replace(point.spec, new=new, room=point.spec.capacity, text_seed=seed, prompt_seed=seed if point.cold else 0)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def temporary_logs() -> Path:
    return Path(tempfile.mkdtemp(prefix="softprompt-bench-"))
