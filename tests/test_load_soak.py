"""Everything at once, for long: what was taken is given back, and nothing grows.

The server has a process of its own, so that its memory is its own. LONG_SOAK_SECONDS (3600) says how long it takes.
The figures are printed once a minute.
"""

from __future__ import annotations

import gc
import http.client
import multiprocessing
import os
import random
import statistics
import threading
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from tests.load_harness import Reply, ask, live, tensors
from tests.test_load_disconnects import come_and_leave

SECONDS = float(os.environ.get("LONG_SOAK_SECONDS", "3600"))
NUM_CLIENTS = 6
TASKS = ("mood", "other", "third")


class AtRest(NamedTuple):
    """The server's process, when nobody asks it anything."""

    requests: int
    uploads: int
    rss: float  # MB
    descriptors: int
    threads: int


def serve(root: Path, pipe: Connection) -> None:
    """The port first; then, for each question, what the process holds once every request is over; ends with None."""
    with live(root, max_num_seqs=8, kv_cache_tokens=8_192, host_cache_bytes=2**20) as server:
        for seed, task in enumerate(TASKS):
            server.publish(task, seed)
            server.publish(task, seed + 100)
        pipe.send(server.port)
        process = psutil.Process()
        while (counts := pipe.recv()) is not None:
            server.assert_idle()
            gc.collect()
            pipe.send(
                AtRest(*counts, process.memory_info().rss / 1e6, process.num_fds(), process.num_threads()),
            )


class Soak:
    def __init__(self, port: int, pipe: Connection) -> None:
        self._port, self._pipe = port, pipe
        self._over = threading.Event()
        self.counts: dict[str, int] = {"requests": 0, "aborts": 0, "uploads": 0, "swaps": 0, "deletes": 0}
        self.problems: list[str] = []

    def run(self, seconds: float, sample: float) -> list[AtRest]:
        samples, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            self._over.clear()
            work = [*[self._ask] * NUM_CLIENTS, *[self._leave] * 2, self._publish]
            threads = [threading.Thread(target=self._guard, args=(w, i)) for i, w in enumerate(work)]
            for thread in threads:
                thread.start()
            time.sleep(min(sample, max(0.0, end - time.monotonic())))
            self._over.set()
            for thread in threads:
                thread.join()
            assert not self.problems, self.problems[:3]
            self._pipe.send((self.counts["requests"] + self.counts["aborts"], self.counts["uploads"]))
            samples.append(self._pipe.recv())  # EOFError if it was not at rest: its own words are on stderr
            print(self.counts, samples[-1], flush=True)  # noqa: T201
        return samples

    def _ask(self, rng: random.Random) -> None:
        text = "".join(rng.choices("abcdefgh ", k=rng.randint(1, 200)))
        body = {"task": rng.choice(TASKS), "input": text}
        if rng.random() < 0.3:
            reply = self._send("POST", "/v1/classify", body | {"labels": ["positive", "negative"]})
        else:
            body |= {"max_tokens": rng.randint(1, 30), "stream": rng.random() < 0.5}
            reply = self._send("POST", "/v1/generate", body)
        assert reply.status == 200, reply.body
        self.counts["requests"] += 1

    def _leave(self, rng: random.Random) -> None:
        come_and_leave(self._port, rng)
        self.counts["aborts"] += 1

    def _publish(self, rng: random.Random) -> None:
        task, kind = rng.choice(TASKS), {"Content-Type": "application/octet-stream"}
        path = f"/v1/tasks/{task}"
        reply = self._send("POST", f"{path}/versions", tensors(rng.randrange(10**9)), kind)
        assert reply.status == 201, reply.body
        self.counts["uploads"] += 1
        versions = self._send("GET", path).json["versions"]
        for number in (versions[-2], versions[-1]):
            etag = self._send("GET", f"{path}/aliases/latest").headers["etag"]
            moved = self._send("PUT", f"{path}/aliases/latest", {"version": number}, {"If-Match": etag})
            assert moved.status == 200, moved.body
            self.counts["swaps"] += 1
        for number in versions[:-2]:
            assert self._send("DELETE", f"{path}/versions/{number}").status == 200
            self.counts["deletes"] += 1
        time.sleep(0.05)

    def _send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)) as connection:
            return ask(connection, method, path, body, headers)

    def _guard(self, work, number: int) -> None:  # type: ignore[no-untyped-def]
        rng = random.Random(f"{number} {self.counts}")
        try:
            while not self._over.is_set() and not self.problems:
                work(rng)
        except Exception as error:
            self.problems.append(f"{work.__name__}: {error!r}")


@pytest.mark.long
@pytest.mark.timeout(0)
def test_soak(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    server = spawn.Process(target=serve, args=(tmp_path / "prompts", theirs))
    server.start()
    theirs.close()
    try:
        samples = Soak(pipe.recv(), pipe).run(SECONDS, min(60.0, SECONDS / 12))
        pipe.send(None)
    finally:
        pipe.close()
        server.join(60)
        server.kill()
    assert server.exitcode == 0
    settled = samples[len(samples) // 3 :]
    requests, uploads, rss, descriptors, threads = zip(*settled, strict=True)
    slope = statistics.linear_regression(requests, rss).slope * 100_000
    print(  # noqa: T201
        f"{requests[-1]} requests in {SECONDS:.0f} s; after warming up RSS {rss[0]:.1f} to {rss[-1]:.1f} MB, "
        f"{slope:+.2f} MB for 100 000 requests; descriptors {min(descriptors)} to {max(descriptors)}, "
        f"threads {min(threads)} to {max(threads)}"
    )
    assert max(descriptors) - min(descriptors) <= 4 and max(threads) - min(threads) <= 45
    # The tokenizer keeps some MB for each thread until it ends, the registry some kB of each version until it is
    # collected; anything kept of requests would be more.
    assert rss[-1] - rss[0] < 40 + 5e-3 * (uploads[-1] - uploads[0])
