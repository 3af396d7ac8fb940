"""Hot swaps under load: no reply fails, none mixes two versions, none is older than what was acknowledged.

Clients ask, streamed and plain, while a publisher moves the alias as fast as the server lets it and deletes what it has
left behind. Each answer is held to one that the engine gave alone, before, behind the digest that the reply names.
"""

from __future__ import annotations

import http.client
import itertools
import os
import random
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.api_harness import events
from tests.load_harness import Live, Reply, ask, content, golden, live, tensors

NUM_CLIENTS = 32
SEEDS = range(12)
MAX_LIVE = 4  # versions; what is older is deleted, whoever uses it
TEXTS = ("the first one", "and another text", "x")
MAX_TOKENS = 12
THINKING = 0.2  # seconds at most between a client's requests, so that the publisher gets its share of the cores
STEP_SECONDS = 0.04  # long enough for many swaps within an answer, and the cores are the publisher's meanwhile
TASK = "swapped"
BODY = {"task": TASK, "max_tokens": MAX_TOKENS}


class History:
    """What the alias has named, in order, as the only one who moves it knows it."""

    def __init__(self) -> None:
        self._digests: list[str] = []
        self._acknowledged = -1

    def begin(self, digest: str) -> None:
        """The move is about to be sent."""
        self._digests.append(digest)

    def acknowledge(self) -> None:
        self._acknowledged = len(self._digests) - 1

    @property
    def oldest(self) -> int:
        """What a request that is sent now may still be answered with."""
        return self._acknowledged

    def find(self, digest: str, oldest: int) -> int | None:
        """The first place from `oldest` on where it stands."""
        return next((i for i in range(oldest, len(self._digests)) if self._digests[i] == digest), None)


class Swaps:
    """One publisher, many clients."""

    def __init__(self, server: Live, seed: int, check_every: int) -> None:
        self._server = server
        self._check_every = check_every  # turns
        self._random = random.Random(seed)
        self._answers = golden(SEEDS, TEXTS, MAX_TOKENS)
        self._digests = [content(seed).prompt.digest for seed in SEEDS]
        self._history = History()
        self._over = threading.Event()
        self._live: list[int] = []  # not deleted, oldest first
        self.versions: dict[int, str] = {}  # number -> digest, as the publisher was told
        self.named: set[tuple[int, str]] = set()  # as replies said
        self.problems: list[str] = []
        self.num_replies = 0
        self.num_overtaken = 0  # replies during which the alias moved
        self.num_swaps = 0
        self.num_deletions = 0

    def run(self, num_swaps: int) -> None:
        clients = [threading.Thread(target=self._guard, args=(self._ask, number)) for number in range(NUM_CLIENTS)]
        connection = self._connect()
        with closing(connection):
            self._publish(connection, move=True)
            for client in clients:
                client.start()
            self._guard(self._swap, connection, num_swaps)
            self._over.set()
            for client in clients:
                client.join()

    # -- the publisher ---------------------------------------------------------------------------------------------

    def _swap(self, connection: http.client.HTTPConnection, num_swaps: int) -> None:
        for turn in itertools.count(1):
            if self.num_swaps >= num_swaps or self.problems:
                return
            others = [number for number in self._live if number != self._current]
            if turn % 8 == 0:
                self._publish(connection, move=True)
            elif turn % 8 == 4 or not others:
                self._move(connection, self._publish(connection, move=False))
            else:
                self._move(connection, self._random.choice(others))
            if turn % self._check_every == 0:
                self._check_fresh(connection, turn)
            if len(self._live) > MAX_LIVE:
                self._delete(connection, next(number for number in self._live if number != self._current))

    def _delete(self, connection: http.client.HTTPConnection, number: int) -> None:
        reply = ask(connection, "DELETE", f"/v1/tasks/{TASK}/versions/{number}")
        assert reply.status == 200, reply.body
        self._live.remove(number)
        self.num_deletions += 1

    def _publish(self, connection: http.client.HTTPConnection, *, move: bool) -> int:
        index = len(self.versions) % len(SEEDS)
        path = f"/v1/tasks/{TASK}/versions" + ("" if move else "?alias=")
        if move:
            self._history.begin(self._digests[index])
        kind = {"Content-Type": "application/octet-stream"}
        reply = ask(connection, "POST", path, tensors(SEEDS[index]), kind)
        assert reply.status == 201, reply.body
        number: int = reply.json["version"]
        assert reply.json["digest"] == self._digests[index] and number not in self.versions
        self.versions[number] = self._digests[index]
        self._live.append(number)
        if move:
            self._moved(number)
        return number

    def _move(self, connection: http.client.HTTPConnection, number: int) -> None:
        path = f"/v1/tasks/{TASK}/aliases/latest"
        if not self._etag:
            self._etag = ask(connection, "GET", path).headers["etag"]
        self._history.begin(self.versions[number])
        reply = ask(connection, "PUT", path, {"version": number}, {"If-Match": self._etag})
        assert reply.status == 200, reply.body
        self._moved(number)
        self._etag = reply.headers["etag"]

    def _moved(self, number: int) -> None:
        self._history.acknowledge()
        self._current, self._etag = number, ""
        self.num_swaps += 1

    def _check_fresh(self, connection: http.client.HTTPConnection, turn: int) -> None:
        """The very next request, over the same connection or another."""
        body = {**BODY, "input": "x", "max_tokens": 1}
        if turn % 2:
            reply = ask(connection, "POST", "/v1/generate", body)
        else:
            reply = self._server.ask("POST", "/v1/generate", body)
        assert reply.json["version"] == self._current, "stale after the move was acknowledged"

    # -- clients ---------------------------------------------------------------------------------------------------

    def _ask(self, number: int) -> None:
        rng, seen = random.Random(number), 0
        connection = self._connect()
        with closing(connection):
            while not self._over.is_set() and not self.problems:
                texts = rng.sample(TEXTS, rng.randint(1, 2))
                streamed = number % 2 == 0
                oldest, before = max(seen, self._history.oldest), self.num_swaps
                reply = ask(connection, "POST", "/v1/generate", {**BODY, "input": texts, "stream": streamed})
                assert reply.status == 200, reply.body
                digest = (self._check_stream if streamed else self._check_plain)(reply, texts)
                found = self._history.find(digest, oldest)
                assert found is not None, f"{reply.headers['x-prompt-version']} is older than what was known"
                seen = found
                self.num_replies += 1
                self.num_overtaken += self.num_swaps > before
                time.sleep(rng.random() * THINKING)

    def _check_plain(self, reply: Reply, texts: list[str]) -> str:
        found = reply.json
        self._check(reply, found, texts, [output["text"] for output in found["outputs"]])
        digest: str = found["digest"]
        return digest

    def _check_stream(self, reply: Reply, texts: list[str]) -> str:
        pieces = events(reply.body.decode())
        assert not any("error" in piece for piece in pieces), pieces[-1]
        first, last = pieces[0], pieces[-1]
        assert (first["version"], first["digest"]) == (last["version"], last["digest"])
        outputs = ["".join(p["text"] for p in pieces if p.get("index") == index) for index in range(len(texts))]
        self._check(reply, first, texts, outputs)
        digest: str = first["digest"]
        return digest

    def _check(self, reply: Reply, named: dict[str, Any], texts: list[str], outputs: list[str]) -> None:
        version, digest = named["version"], named["digest"]
        assert reply.headers["x-prompt-version"] == f"{TASK}:{version}"
        assert reply.headers["x-prompt-digest"] == digest
        self.named.add((version, digest))
        expected = [self._answers[digest][text] for text in texts]
        assert outputs == expected, f"{TASK}:{version} answers with another version's text"

    # -- both ------------------------------------------------------------------------------------------------------

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=60)

    def _guard(self, work: Any, *args: Any) -> None:
        try:
            work(*args)
        except Exception as error:
            self.problems.append(f"{type(error).__name__}: {error}")


def swap(root: Path, num_swaps: int, *, check_every: int = 3, **options: Any) -> Swaps:
    with live(root, max_num_seqs=64, step_seconds=STEP_SECONDS, **options) as server:
        start = time.monotonic()
        swaps = Swaps(server, 0, check_every)
        swaps.run(num_swaps)
        assert not swaps.problems, swaps.problems[:3]
        assert swaps.num_swaps >= num_swaps and swaps.num_replies >= NUM_CLIENTS
        assert swaps.num_overtaken > swaps.num_replies / 2, "the alias rarely moved while an answer was under way"
        assert swaps.named <= set(swaps.versions.items()), "a number and a digest that do not belong together"
        server.assert_idle()
        print(  # noqa: T201
            f"{swaps.num_swaps} swaps, {swaps.num_deletions} deletions, {swaps.num_replies} replies, "
            f"{swaps.num_overtaken} overtaken by a swap, behind {len(swaps.named)} versions by {NUM_CLIENTS} clients "
            f"in {time.monotonic() - start:.0f} s"
        )
    return swaps


def test_the_answers_differ() -> None:
    """Otherwise nothing here would show anything."""
    answers = golden(SEEDS, TEXTS, MAX_TOKENS).values()
    assert len({answer for texts in answers for answer in texts.values()}) == len(SEEDS) * len(TEXTS)


def test_swaps_under_load(tmp_path: Path) -> None:
    swaps = swap(tmp_path / "prompts", 60)
    assert len(swaps.named) > 6


def test_swaps_under_load_in_a_cache_that_is_too_small(tmp_path: Path) -> None:
    """The prompts' keys and values are evicted and come back while versions go."""
    swap(tmp_path / "prompts", 30, kv_cache_tokens=1_024)


@pytest.mark.long
def test_many_swaps_under_load(tmp_path: Path) -> None:
    swap(tmp_path / "prompts", int(os.environ.get("LONG_SWAPS", "20000")), check_every=1)
