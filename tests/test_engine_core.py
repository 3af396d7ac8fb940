"""What the core gives back: memory when it runs short, and a prompt's when it was unloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from app.engine import Token
from tests.core_harness import Harness
from tests.tiny import random_prompt, tiny_base

MODEL, INFO = tiny_base("llama").model, tiny_base("llama").info
PROMPT, OTHER = random_prompt(1), random_prompt(2)


def is_held(harness: Harness, digest: str) -> bool:
    return harness.blocks.prefix(digest) is not None or digest in harness.core.runner.host


@pytest.mark.parametrize("where", ["waiting", "scored", "preempted"])
def test_an_unloaded_prompt_goes_with_the_last_request_that_brought_it_back(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(MODEL, INFO, monkeypatch, max_num_seqs=1)
    first = harness.add(OTHER, [1, 2, 3])
    scores = harness.score(PROMPT, [4, 5], [[1, 2], [3]]) if where == "scored" else [None]
    if where != "scored":
        harness.add(PROMPT, [4, 5])
    harness.add(PROMPT, [6])
    harness.core.step()
    if where == "preempted":
        while first in harness.scheduler.running or not harness.scheduler.running:
            harness.core.step()
        harness.scheduler._preempt(harness.scheduler.running[-1])
    harness.core.unload(PROMPT.digest)
    harness.run()
    assert len(scores) == 1
    assert all(isinstance(token, Token) for tokens in harness.tokens.values() for token in tokens)
    assert not is_held(harness, PROMPT.digest) and is_held(harness, OTHER.digest)
    harness.add(PROMPT, [4, 5])  # uploaded again
    harness.run()
    assert is_held(harness, PROMPT.digest)
    harness.assert_clean()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room"),
        MemoryError("no memory for a step of the native decoder"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_gives_up_the_host_tier_and_tries_once_more(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(MODEL, INFO, monkeypatch)
    harness.load(PROMPT)
    harness.run()
    host, run = harness.core.runner.host, harness.core.runner.run
    assert host.num_bytes > 0

    def full(rows: Any) -> Any:
        if host.num_bytes:
            raise error
        return run(rows)

    monkeypatch.setattr(harness.core.runner, "run", full)
    harness.add(None, [1, 2, 3])
    harness.run()
    assert len(harness.ids(0)) == 8 and len(host) == 0


def test_another_error_gives_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(MODEL, INFO, monkeypatch)
    harness.load(PROMPT)
    harness.run()

    def broken(_: Any) -> Any:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(harness.core.runner, "run", broken)
    harness.add(None, [1, 2, 3])
    harness.run()
    assert isinstance(harness.tokens[0][-1], Exception) and len(harness.core.runner.host) == 1
