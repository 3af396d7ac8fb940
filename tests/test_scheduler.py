"""Policy and accounting, without a model: random requests against the invariants."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from app.engine import SamplingParams
from app.engine.block_manager import BlockManager, Prefix
from app.engine.scheduler import Scheduler
from app.engine.sequence import GenerationSequence


@dataclass(eq=False)
class FakePrompt:
    digest: str
    num_virtual_tokens: int


def sequence(prompt: FakePrompt | None, num_tokens: int, max_tokens: int = 4) -> GenerationSequence:
    return GenerationSequence([1] * num_tokens, prompt, params=SamplingParams(max_tokens=max_tokens))  # type: ignore[arg-type]


def check(scheduler: Scheduler) -> None:
    """Every reference is accounted for, and no two owners write the same block."""
    blocks = scheduler.blocks
    expected = [0] * blocks.num_blocks
    for prefix in blocks._prefixes.values():
        for block in prefix.block_table:
            expected[block] += 1
    writable: set[int] = set()
    for row in scheduler.running:
        for block in row.block_table:
            expected[block] += 1
        shared = row.prefix.num_tokens // blocks.block_size if row.prefix else 0
        own = set(row.block_table[shared:])
        assert not own & writable
        writable |= own
        if row.prefix and row.prefix.resident:
            assert row.block_table[:shared] == row.prefix.block_table[:shared]
            assert not own & set(row.prefix.block_table)
    assert expected == blocks._references
    assert expected[0] == 0
    assert sorted(blocks._free) == [i for i in range(1, blocks.num_blocks) if expected[i] == 0]


@pytest.mark.parametrize("seed", range(40))
def test_random_traffic_keeps_the_books_and_ends(seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16])
    scheduler = Scheduler(BlockManager(rng.randint(12, 40), block_size), rng.randint(1, 8), rng.randint(8, 40))
    prompts = [FakePrompt(f"sha256:{i}", rng.randint(1, 3 * block_size)) for i in range(5)]
    todo = []
    for _ in range(30):
        new = sequence(rng.choice([None, *prompts]), rng.randint(1, 4 * block_size), rng.randint(1, 2 * block_size))
        if scheduler.blocks.fits_alone(new.num_virtual_tokens, new.num_tokens + new.params.max_tokens):
            todo.append(new)
    assert len(todo) > 5
    finished = 0
    total = len(todo)
    for _ in range(20_000):
        if todo and rng.random() < 0.5:
            scheduler.add(todo.pop())
        if not todo and not scheduler.has_work:
            break
        step = scheduler.schedule()
        check(scheduler)
        assert sum(row.num_tokens for row in step.rows) <= scheduler.max_num_batched_tokens
        assert {row.sequence for row in step.rows} == set(scheduler.running), "a running row got no token"
        assert len({row.sequence for row in step.rows}) == len(step.rows)
        assert bool(step.rows) == scheduler.has_work
        for row in step.rows:
            assert row.start == row.sequence.num_computed_tokens < row.end <= row.sequence.num_tokens
            assert len(row.sequence.block_table) * block_size >= row.end
            row.sequence.num_computed_tokens = row.end
            if row.num_logits and row.sequence.append(7):  # type: ignore[attr-defined]
                scheduler.remove(row.sequence)
                finished += 1
            elif rng.random() < 0.02:  # aborted
                scheduler.remove(row.sequence)
                finished += 1
        check(scheduler)
    assert finished == total


def test_a_prefix_is_held_once_and_its_partial_block_copied() -> None:
    scheduler = Scheduler(BlockManager(20, 4), 8, 64)
    prompt = FakePrompt("sha256:a", 6)  # one full block, half of another
    rows = [sequence(prompt, 3) for _ in range(3)]
    for row in rows:
        scheduler.add(row)
    step = scheduler.schedule()
    assert [load[0] for load in step.loads] == [prompt]
    full, partial = step.loads[0][1].block_table
    assert [row.block_table[0] for row in rows] == [full] * 3
    copies = {row.block_table[1] for row in rows}
    assert len(copies) == 3 and partial not in copies
    assert sorted(step.copies) == sorted((partial, block) for block in copies)
    assert all(row.start == 6 for row in step.rows), "virtual tokens are not computed again"


def test_a_long_prompt_leaves_a_token_for_every_running_row() -> None:
    scheduler = Scheduler(BlockManager(100, 4), 8, 16)
    long = sequence(None, 100)
    scheduler.add(long)
    scheduler.schedule().rows[0].sequence.num_computed_tokens = 16
    streams = [sequence(None, 1) for _ in range(4)]
    for stream in streams:
        stream.num_computed_tokens = 0
        scheduler.running.append(stream)
        stream.block_table = scheduler.blocks.allocate(1) or []
    counts = {row.sequence: row.num_tokens for row in scheduler.schedule().rows}
    assert counts == {long: 12, **dict.fromkeys(streams, 1)}


def test_the_newest_sequence_is_preempted_and_starts_again() -> None:
    scheduler = Scheduler(BlockManager(1 + 4, 4), 8, 64)
    old, new = sequence(None, 8, 8), sequence(None, 8, 8)
    scheduler.add(old)
    scheduler.add(new)
    for row in scheduler.schedule().rows:
        row.sequence.num_computed_tokens = row.end
        row.sequence.append(7)  # type: ignore[attr-defined]
    step = scheduler.schedule()
    assert [row.sequence for row in step.rows] == [old]
    assert list(scheduler.waiting) == [new] and new.num_computed_tokens == 0 and new.block_table == []
    assert len(new.token_ids) == 9, "what it had generated is kept"
    assert scheduler.num_preemptions == 1
    check(scheduler)


def test_eviction_takes_the_least_recently_used_idle_prefix() -> None:
    blocks = BlockManager(1 + 4, 4)
    for key in "abc":
        table = blocks.allocate(1)
        assert table is not None
        blocks.add(Prefix(key, 4, table))
    for key in "bca":  # used again, so "b" is now the oldest
        in_use = blocks.prefix(key)
        assert in_use is not None
        in_use.users = int(key == "b")
    assert blocks.allocate(2) is not None
    assert blocks.prefix("c") is None, "b is older, but in use"
    assert blocks.allocate(2) is None, "only one more can be freed"
    assert blocks.prefix("b") and blocks.prefix("a"), "a request that cannot be met evicts nothing"
    assert blocks.num_evictions == 1


def test_dropping_a_prefix_in_use_leaves_its_rows_alone() -> None:
    scheduler = Scheduler(BlockManager(20, 4), 8, 64)
    prompt = FakePrompt("sha256:a", 8)
    row = sequence(prompt, 3)
    scheduler.add(row)
    (_, prefix), *_ = scheduler.schedule().loads
    table = list(row.block_table)
    scheduler.blocks.drop(prefix)
    assert row.block_table == table
    assert scheduler.blocks.num_used_blocks == 3
    scheduler.remove(row)
    assert scheduler.blocks.num_used_blocks == 0
