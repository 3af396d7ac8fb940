"""Room for requests: how many a server ever takes of one, and that one with more is not told to try again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest

from app.engine.in_flight import InFlight
from app.errors import Overloaded
from tests.load_harness import live


def let_in(limit: int, digests: Iterable[str]) -> int:
    """How many of them, one after another."""
    in_flight = InFlight(limit)
    for count, digest in enumerate(digests):
        try:
            in_flight.check(digest)
        except Overloaded:
            return count
        in_flight.add(digest)
    raise AssertionError("there is no end")


def test_what_one_request_may_have_at_most() -> None:
    for limit in range(1, 400):
        most = InFlight(limit).max_alone
        assert most == let_in(limit, itertools.repeat("a"))
        assert most <= let_in(limit, itertools.cycle("ab"))
        assert most <= let_in(limit, itertools.chain("a" * (most // 2), itertools.repeat("b")))


@pytest.mark.parametrize(("num_inputs", "members"), [(8, 1), (4, 2), (9, 1), (5, 2), (1, 9)])
def test_a_request_that_would_never_fit_is_the_clients_to_mend(tmp_path: Path, num_inputs: int, members: int) -> None:
    """An idle server of 9 places: 8 rows are answered, more are a 400 and no 503 to be sent again for ever."""
    with live(tmp_path / "prompts", max_num_seqs=4, max_waiting=5) as server:
        tasks = [f"mood-{number}" for number in range(members)]
        for seed, task in enumerate(tasks):
            server.publish(task, seed, labels=["x", "y"])
        fits = num_inputs * members <= 8
        for path in ("/v1/generate", "/v1/classify"):
            body = {"task": tasks if members > 1 else tasks[0], "input": ["a"] * num_inputs}
            reply = server.ask("POST", path, body | ({"max_tokens": 2} if path == "/v1/generate" else {}))
            assert reply.status == (200 if fits else 400), (path, reply.body)
            if not fits:
                assert reply.json["error"]["param"] == ("task" if members > 1 else "input")
        server.assert_idle()
