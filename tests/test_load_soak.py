"""Everything at once, for long: what was taken is given back, and nothing grows.

LONG_SOAK_SECONDS (3600) says how long. The figures are printed once a minute.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.load_harness import Live, live, tensors
from tests.test_load_disconnects import come_and_leave

SECONDS = float(os.environ.get("LONG_SOAK_SECONDS", "3600"))
NUM_CLIENTS = 6
TASKS = ("mood", "other", "third")


class Soak:
    def __init__(self, server: Live) -> None:
        self._server = server
        self._over = threading.Event()
        self.counts: dict[str, int] = {"requests": 0, "aborts": 0, "uploads": 0, "swaps": 0, "deletes": 0}
        self.problems: list[str] = []

    def run(self, seconds: float, sample: float) -> list[tuple[float, float, int, int]]:
        """(requests, RSS in MB, descriptors, threads), taken at rest."""
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
            self._server.assert_idle()
            gc.collect()
            process = psutil.Process()
            requests = self.counts["requests"] + self.counts["aborts"]
            samples.append((requests, process.memory_info().rss / 1e6, process.num_fds(), process.num_threads()))
            _, rss, descriptors, num_threads = samples[-1]
            print(self.counts, f"RSS {rss:.1f} MB, {descriptors} descriptors, {num_threads} threads")  # noqa: T201
        return samples

    def _ask(self, rng: random.Random) -> None:
        text = "".join(rng.choices("abcdefgh ", k=rng.randint(1, 200)))
        body = {"task": rng.choice(TASKS), "input": text}
        if rng.random() < 0.3:
            reply = self._server.ask("POST", "/v1/classify", body | {"labels": ["positive", "negative"]})
        else:
            body |= {"max_tokens": rng.randint(1, 30), "stream": rng.random() < 0.5}
            reply = self._server.ask("POST", "/v1/generate", body)
        assert reply.status == 200, reply.body
        self.counts["requests"] += 1

    def _leave(self, rng: random.Random) -> None:
        come_and_leave(self._server.port, rng)
        self.counts["aborts"] += 1

    def _publish(self, rng: random.Random) -> None:
        task, kind = rng.choice(TASKS), {"Content-Type": "application/octet-stream"}
        path = f"/v1/tasks/{task}"
        reply = self._server.ask("POST", f"{path}/versions", tensors(rng.randrange(10**9)), kind)
        assert reply.status == 201, reply.body
        self.counts["uploads"] += 1
        versions = self._server.ask("GET", path).json["versions"]
        for number in (versions[-2], versions[-1]):
            etag = self._server.ask("GET", f"{path}/aliases/latest").headers["etag"]
            moved = self._server.ask("PUT", f"{path}/aliases/latest", {"version": number}, {"If-Match": etag})
            assert moved.status == 200, moved.body
            self.counts["swaps"] += 1
        for number in versions[:-2]:
            assert self._server.ask("DELETE", f"{path}/versions/{number}").status == 200
            self.counts["deletes"] += 1
        time.sleep(0.05)

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
    with live(tmp_path / "prompts", max_num_seqs=8, kv_cache_tokens=8_192, host_cache_bytes=2**20) as server:
        for seed, task in enumerate(TASKS):
            server.publish(task, seed)
            server.publish(task, seed + 100)
        samples = Soak(server).run(SECONDS, min(60.0, SECONDS / 12))
        settled = samples[len(samples) // 3 :]
        x, rss, descriptors, threads = zip(*settled, strict=True)
        slope = statistics.linear_regression(x, rss).slope * 100_000
        print(  # noqa: T201
            f"{x[-1]} requests in {SECONDS:.0f} s; after warming up RSS {rss[0]:.1f} to {rss[-1]:.1f} MB, "
            f"{slope:+.2f} MB for 100 000 requests; descriptors {min(descriptors)} to {max(descriptors)}, "
            f"threads {min(threads)} to {max(threads)}"
        )
        assert max(descriptors) - min(descriptors) <= 4 and max(threads) - min(threads) <= 45
        # A request that leaked its text or a prompt's tensors would show as more than that.
        assert rss[-1] - rss[0] < 20 + x[-1] * 1e-3
