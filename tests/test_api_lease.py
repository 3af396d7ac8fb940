"""A lease is given back once, by whoever ends last, on whichever thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.api.counts import Counts
from app.api.lease import Lease
from app.api.request_stats import RequestStats
from app.engine import SamplingParams
from app.errors import EngineFailed, Overloaded
from app.registry import Pin, Version
from tests.api_harness import Harness


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    harness = Harness.create(tmp_path / "prompts")
    harness.publish("a")
    return harness


def lease_of(pin: Pin | None) -> Lease:
    return Lease(pin, lambda: None, RequestStats(Counts(list)))


@pytest.fixture
def version(harness: Harness) -> Version:
    return harness.registry.resolve("a")


def test_the_last_share_releases_the_pin(harness: Harness, version: Version) -> None:
    lease = lease_of(harness.registry.pin("a"))
    shares = [lease.share() for _ in range(3)]
    for give_back in shares[:2]:
        give_back()
        give_back()
    assert harness.registry.pins(version) == 1, "giving one back twice is giving one back"
    shares[2]()
    assert harness.registry.pins(version) == 0


def test_from_many_threads(harness: Harness, version: Version) -> None:
    lease = lease_of(harness.registry.pin("a"))
    own, start = lease.share(), threading.Barrier(8)

    def hold_and_give_back() -> None:
        start.wait()
        for _ in range(500):
            lease.share()()

    threads = [threading.Thread(target=hold_and_give_back) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert harness.registry.pins(version) == 1
    own()
    assert harness.registry.pins(version) == 0


def test_an_engine_that_refuses(harness: Harness, version: Version) -> None:
    lease = lease_of(harness.registry.pin("a"))
    own = lease.share()
    harness.engine.refuse = (0, Overloaded("no room"))
    with pytest.raises(Overloaded):
        lease.generate(harness.engine, [1], SamplingParams())
    with pytest.raises(Overloaded):
        asyncio.run(lease.score(harness.engine, [1], [[2]]))
    assert harness.registry.pins(version) == 1
    own()
    assert harness.registry.pins(version) == 0


def test_an_engine_that_gives_back_and_fails(harness: Harness, version: Version) -> None:
    """Both sides give the same share back; the request's own share must survive that."""
    lease = lease_of(harness.registry.pin("a"))
    own = lease.share()
    harness.engine.fail_after = (0, EngineFailed("broken"))
    with pytest.raises(EngineFailed):
        asyncio.run(lease.score(harness.engine, [1], [[2]]))
    assert harness.engine.calls[0].releases == 1
    assert harness.registry.pins(version) == 1
    own()
    assert harness.registry.pins(version) == 0


def test_a_cancelled_score_is_the_engines_to_give_back(
    harness: Harness, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Callable[[], None]] = []

    async def score(*_: Any, on_release: Callable[[], None], **__: Any) -> list[list[float]]:
        kept.append(on_release)
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(harness.engine, "score", score)

    async def main() -> None:
        lease = lease_of(harness.registry.pin("a"))
        own = lease.share()
        task = asyncio.create_task(lease.score(harness.engine, [1], [[2]]))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        own()

    asyncio.run(main())
    assert harness.registry.pins(version) == 1, "the engine still computes behind this prompt"
    kept[0]()
    assert harness.registry.pins(version) == 0


def test_the_bare_base_has_nothing_to_release() -> None:
    lease = lease_of(None)
    lease.share()()
    assert (lease.version, lease.prompt, lease.num_virtual_tokens) == (None, None, 0)
