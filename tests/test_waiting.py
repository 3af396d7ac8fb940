"""The waiting room's length, which the event loop reads while the engine thread changes the lanes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from app.engine import SamplingParams
from app.engine.sequence import GenerationSequence
from app.engine.waiting import WaitingQueue
from app.soft_prompt import SoftPrompt


def sequence(lane: int) -> GenerationSequence:
    prompt = SoftPrompt("embedding", torch.zeros(1, 4), digest=f"sha256:{lane}")
    return GenerationSequence([1], prompt, "", params=SamplingParams(), constraint=None, emit=lambda _: None)


@pytest.fixture
def _hasty_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_the_length() -> None:
    waiting, items = WaitingQueue(), [sequence(number % 3) for number in range(6)]
    for item in items[:4]:
        waiting.add(item)
    waiting.add_next(items[4])
    waiting.resume(items[5])
    assert len(waiting) == len(list(waiting)) == 6
    for item in items:
        waiting.admit(item)
        assert not waiting.remove(item)
        assert len(waiting) == len(list(waiting))
    assert not waiting


@pytest.mark.usefixtures("_hasty_threads")
def test_the_length_while_lanes_come_and_go() -> None:
    """An exception there ended the server: it asks ten times a second whether the engine has given up."""
    waiting, items, over = WaitingQueue(), [sequence(number) for number in range(8)], threading.Event()

    def change() -> None:
        while not over.is_set():
            for item in items:
                waiting.add(item)
            for item in items:
                waiting.remove(item)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(20_000):
            assert 0 <= len(waiting) <= len(items)
    finally:
        over.set()
        thread.join()
