"""Resident memory of the server process: what a task costs, and whether many requests leave anything behind."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from benchmarks.driver import Options, say
from benchmarks.machine import rss
from benchmarks.systems.http_ours import HttpOurs
from benchmarks.workload import Spec, Workload

SOAK_REQUESTS = 10_000
SOAK_SAMPLES = 20
SETTLE_SECONDS = 1.0  # until threads that just worked are idle
SETTLING_TASKS = 8


class Peak:
    """The largest RSS while the block runs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.bytes = max(self.bytes, rss(self._pid))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def per_task(arguments: argparse.Namespace, options: Options) -> dict[str, Any]:
    """Memory of a registered, a loaded and a running task: steps of the server's RSS."""

    def body(client: HttpOurs, pid: int, sample: Callable[..., int]) -> dict[str, str]:
        count, rows, virtual = arguments.tasks[0], arguments.rows[0], arguments.virtual[0]
        # Tasks of another seed warm up buffers and allocators, with the largest batch that follows.
        settling = Spec(rows=rows, virtual=virtual, text=arguments.text, new=8, tasks=SETTLING_TASKS, prompt_seed=1)
        client.run(settling)
        before = sample("warm-up")
        touch = Spec(rows=8, requests=count, virtual=virtual, text=4, new=1, tasks=count, text_seed=1)
        client.register(touch)
        registered = sample(f"{count} tasks registered")
        client.run(touch)
        loaded = sample(f"a request to each of {count} tasks")
        with Peak(pid) as peak:
            client.run(Spec(rows=rows, virtual=virtual, text=arguments.text, new=arguments.new, tasks=rows))
        running = sample(f"{rows} tasks run at once (peak)", peak.bytes)
        return {
            "registered, KiB a task": f"{(registered - before) / count / 1024:.1f}",
            "loaded, KiB a task more": f"{(loaded - registered) / count / 1024:.1f}",
            # Blocks that may have been counted at the start already, when the cache was taken.
            "keys and values of a loaded task, KiB": f"{client.kv_bytes(virtual) / 1024:.0f}",
            "running, KiB a row more": f"{(running - loaded) / rows / 1024:.1f}",
        }

    return _with_server(arguments, options, body)


def soak(arguments: argparse.Namespace, options: Options) -> dict[str, Any]:
    """RSS over 10,000 short requests."""

    def body(client: HttpOurs, _: int, sample: Callable[..., int]) -> dict[str, str]:
        total = arguments.requests or SOAK_REQUESTS
        portion = max(total // SOAK_SAMPLES, 1)
        sizes: list[int] = []
        began = time.perf_counter()
        for index in range(SOAK_SAMPLES):
            client.run(
                Spec(
                    rows=arguments.rows[0],
                    requests=portion,
                    virtual=arguments.virtual[0],
                    text=arguments.text,
                    new=arguments.new,
                    tasks=arguments.tasks[0],
                    text_seed=index + 1,
                )
            )
            sizes.append(sample(f"{(index + 1) * portion} requests"))
        seconds = time.perf_counter() - began
        growth = sizes[-1] - sizes[0]
        done = portion * (SOAK_SAMPLES - 1)
        return {
            "requests a second": f"{portion * SOAK_SAMPLES / seconds:.1f}",
            f"growth after the first {portion}, MiB": f"{growth / 2**20:.1f}",
            "growth, bytes a request": f"{growth / done:.0f}",
        }

    return _with_server(arguments, options, body)


def _with_server(
    arguments: argparse.Namespace,
    options: Options,
    body: Callable[[HttpOurs, int, Callable[..., int]], dict[str, str]],
) -> dict[str, Any]:
    values = vars(arguments) | {"model": options.model, "quantization": None}
    client = HttpOurs(argparse.Namespace(**values), Workload(options.workload))
    samples: list[dict[str, Any]] = []

    def sample(after: str, value: int | None = None) -> int:
        time.sleep(SETTLE_SECONDS)
        size = rss(client.pid) if value is None else value
        samples.append({"after": after, "rss": size})
        say(f"  {after}: {size / 2**20:.1f} MiB")
        return size

    try:
        sample("start")
        figures = body(client, client.pid, sample)
    finally:
        client.close()
    return {"samples": samples, "figures": figures}
