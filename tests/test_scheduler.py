"""Policy and accounting, without a model: random requests against the invariants."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from app.engine import SamplingParams
from app.engine.block_manager import BlockManager, Prefix
from app.engine.scheduler import Row, Scheduler, Step
from app.engine.sequence import GenerationSequence, PromptSequence, Sequence


@dataclass(eq=False)
class FakePrompt:
    digest: str
    num_virtual_tokens: int
    kind: str = "kv"  # copied in; "embedding" has to be computed


def sequence(prompt: FakePrompt | None, num_tokens: int, max_tokens: int = 4, token: int = 1) -> GenerationSequence:
    return GenerationSequence([token] * num_tokens, prompt, params=SamplingParams(max_tokens=max_tokens))  # type: ignore[arg-type]


def run(scheduler: Scheduler, step: Step) -> list[Row]:
    """What the core does with a step, without a model; the rows whose sequence may go on."""
    for row in step.rows:
        scheduler.computed(row)
        if isinstance(row.sequence, PromptSequence) and row.end == row.sequence.num_tokens:
            scheduler.loaded(next(p for p, load in scheduler.loading.items() if load is row.sequence))
    return [row for row in step.rows if isinstance(row.sequence, GenerationSequence)]


def tokens_in(sequence: Sequence, block: int, block_size: int) -> list[int | str]:
    """What the positions of a block stand for: the virtual tokens' digest, or text."""
    start = sequence.block_table.index(block) * block_size
    digest = sequence.prompt.digest if sequence.prompt else ""
    return [*[digest] * sequence.num_virtual_tokens, *sequence.token_ids][start : start + block_size]


def check(scheduler: Scheduler) -> None:
    """Every reference is accounted for, and nobody writes where others read."""
    blocks = scheduler.blocks
    expected = [0] * blocks.num_blocks
    dropped = {row.prefix for row in scheduler.running if row.prefix and not row.prefix.resident}
    dropped |= {prefix for prefix in scheduler.loading if not prefix.resident}
    for prefix in [*blocks._prefixes.values(), *dropped]:
        for block in prefix.block_table:
            expected[block] += 1
    readers: dict[int, list[Sequence]] = {}
    for row in scheduler.running:
        for block in row.block_table:
            expected[block] += 1
            readers.setdefault(block, []).append(row)
        if row.prefix:
            shared = row.prefix.num_tokens // blocks.block_size
            assert row.block_table[:shared] == row.prefix.block_table[:shared]
            assert not set(row.block_table[shared:]) & set(row.prefix.block_table)
    for block, rows in readers.items():
        texts = [tokens_in(row, block, blocks.block_size) for row in rows]
        assert all(text == texts[0] for text in texts), "one block stands for two texts"
        if len(rows) > 1:
            ends = [(row.block_table.index(block) + 1) * blocks.block_size for row in rows]
            assert all(
                row.num_computed_tokens >= end or not self_written(row, block)
                for row, end in zip(rows, ends, strict=True)
            )
    assert expected == blocks._references
    assert expected[0] == 0
    assert sorted(blocks._free) == [i for i in range(1, blocks.num_blocks) if expected[i] == 0]
    assert {block: name for name, block in blocks._named.items()} == blocks._names


def self_written(row: Sequence, block: int) -> bool:
    """Whether the sequence still has to write this block: not if it is the prefix's."""
    return row.prefix is None or block not in row.prefix.block_table


@pytest.mark.parametrize("seed", range(40))
def test_random_traffic_keeps_the_books_and_ends(seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16])
    scheduler = Scheduler(BlockManager(rng.randint(12, 40), block_size), rng.randint(1, 8), rng.randint(9, 40))
    kinds = ("kv", "embedding")
    prompts = [FakePrompt(f"sha256:{i}", rng.randint(1, 3 * block_size), kinds[i % 2]) for i in range(5)]
    todo = []
    for _ in range(30):
        length, new_tokens = rng.randint(1, 4 * block_size), rng.randint(1, 2 * block_size)
        new = sequence(rng.choice([None, *prompts]), length, new_tokens, token=rng.choice([1, 2]))
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
        rows = {row.sequence for row in step.rows}
        assert rows - set(scheduler.loading.values()) == set(scheduler.running), "a running row got no token"
        assert all(row.prefix is None or row.prefix.ready for row in scheduler.running)
        assert len(rows) == len(step.rows)
        assert bool(step.rows) == scheduler.has_work
        for row in step.rows:
            assert row.start == row.sequence.num_computed_tokens < row.end <= row.sequence.num_tokens
            assert len(row.sequence.block_table) * block_size >= row.end
        for row in run(scheduler, step):
            if (row.num_logits and row.sequence.append(7, None)) or rng.random() < 0.02:  # type: ignore[attr-defined]
                scheduler.remove(row.sequence)
                finished += 1
        if prompts and rng.random() < 0.02:  # replaced
            prefix = scheduler.blocks.prefix(rng.choice(prompts).digest)
            if prefix is not None:
                scheduler.blocks.drop(prefix)
        check(scheduler)
    assert finished == total


def test_a_prefix_is_held_once_and_its_partial_block_copied() -> None:
    scheduler = Scheduler(BlockManager(20, 4), 8, 64)
    prompt = FakePrompt("sha256:a", 6)  # one full block, half of another
    rows = [sequence(prompt, 3, token=i) for i in range(3)]
    for row in rows:
        scheduler.add(row)
    step = scheduler.schedule()
    assert [load[0] for load in step.loads] == [prompt]
    full, partial = step.loads[0][1].block_table
    assert [row.block_table[0] for row in rows] == [full] * 3
    copies = {row.block_table[1] for row in rows}
    assert len(copies) == 3 and partial not in copies
    assert sorted(step.copies) == sorted((partial, block, 2) for block in copies)
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
    old, new = sequence(None, 8, 8), sequence(None, 8, 8, token=2)
    scheduler.add(old)
    scheduler.add(new)
    for row in run(scheduler, scheduler.schedule()):
        row.sequence.append(7, None)  # type: ignore[attr-defined]
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
    assert scheduler.blocks.prefix(prompt.digest) is None
    assert row.block_table == table
    assert scheduler.blocks.num_used_blocks == 3
    scheduler.remove(row)
    assert scheduler.blocks.num_used_blocks == 0


def test_a_prompt_that_has_to_be_computed_delays_its_own_rows_only() -> None:
    scheduler = Scheduler(BlockManager(200, 4), 4, 16)
    slow, long = FakePrompt("sha256:slow", 60, "embedding"), sequence(None, 100, token=8)
    followers = [sequence(slow, 3, token=i) for i in range(6)]
    scheduler.add(long)
    for new in followers:
        scheduler.add(new)
    late: list[GenerationSequence] = []
    for num_steps in range(40):
        step = scheduler.schedule()
        check(scheduler)
        rows = {row.sequence: row.num_tokens for row in step.rows}
        if followers[0] in rows:
            break
        loads = [count for row, count in rows.items() if isinstance(row, PromptSequence)]
        assert len(loads) <= 1, "it is computed once"
        if num_steps > 0:
            assert loads and loads[0] >= 3, "it is not starved"
        if long.num_computed_tokens < 90:
            assert rows[long] >= 3, "nor does it starve others that began before"
        if late:
            assert late[-1] in rows, "who comes meanwhile starts at once"
        for row in run(scheduler, step):
            if row.num_logits and row.sequence is not long:
                scheduler.remove(row.sequence)
        late.append(sequence(None, 1, token=100 + num_steps))
        scheduler.add(late[-1])
    assert 60 // 8 <= num_steps < 20
    assert all(row.start == 60 for row in step.rows if row.sequence in followers)
    assert len(set(scheduler.running)) == 4


def test_what_is_copied_in_is_bounded_in_a_step() -> None:
    scheduler = Scheduler(BlockManager(4_000, 4), 64, 200)
    prompts = [FakePrompt(f"sha256:{i}", 1_000) for i in range(5)]
    for prompt in prompts:
        scheduler.add(sequence(prompt, 1))
    found = []
    for _ in range(4):
        step = scheduler.schedule()
        found.append(len(step.loads))
        run(scheduler, step)
    assert found == [2, 2, 1, 0]


def test_a_prompt_dropped_while_it_is_computed_is_computed_again_for_those_who_wait() -> None:
    scheduler = Scheduler(BlockManager(50, 4), 8, 9)
    prompt = FakePrompt("sha256:a", 20, "embedding")
    row = sequence(prompt, 1)
    scheduler.add(row)
    run(scheduler, scheduler.schedule())
    prefix = scheduler.blocks.prefix(prompt.digest)
    assert prefix is not None
    scheduler.drop(prefix)
    assert scheduler.blocks.num_used_blocks == 0 and not scheduler.loading
    for _ in range(10):
        check(scheduler)
        step = scheduler.schedule()
        run(scheduler, step)
        if row in scheduler.running:
            break
    assert [r.sequence for r in step.rows] == [row]
    scheduler.remove(row)
    again = scheduler.blocks.prefix(prompt.digest)
    assert again is not None and again is not prefix
    scheduler.drop(again)
    assert scheduler.blocks.num_used_blocks == 0


def test_tasks_take_turns() -> None:
    scheduler = Scheduler(BlockManager(200, 4), 4, 64)
    busy, quiet = FakePrompt("sha256:busy", 4), FakePrompt("sha256:quiet", 4)
    flood = [sequence(busy, 3, token=i) for i in range(20)]
    late = [sequence(quiet, 3, token=i) for i in range(2)]
    for new in [*flood, *late]:
        scheduler.add(new)
    scheduler.schedule()
    assert scheduler.running == [flood[0], late[0], flood[1], late[1]]


def test_text_is_found_again_by_prompt_and_salt() -> None:
    scheduler = Scheduler(BlockManager(100, 4), 8, 64)
    prompt, other = FakePrompt("sha256:a", 6), FakePrompt("sha256:b", 6)

    def cached(prompt: FakePrompt | None, tokens: list[int], salt: str = "") -> int:
        """How many text tokens it finds; it runs and ends."""
        row = GenerationSequence(tokens, prompt, salt, params=SamplingParams(max_tokens=1))  # type: ignore[arg-type]
        scheduler.add(row)
        run(scheduler, scheduler.schedule())
        check(scheduler)
        scheduler.remove(row)
        assert row.num_cached_tokens is not None
        return row.num_cached_tokens

    text = list(range(20))
    assert cached(prompt, text) == 0
    assert cached(prompt, text) == 18, "blocks of 4 from position 6 on: positions 8 to 24 hold the text 2 to 18"
    assert cached(prompt, [*text[:13], 99, *text[14:]]) == 10
    assert cached(prompt, [99, *text[1:]]) == 0
    assert cached(prompt, text, salt="tenant") == 0
    assert cached(prompt, text, salt="tenant") == 18
    assert cached(other, text) == 0
    assert cached(None, text) == 0
    assert cached(None, text[:17]) == 16, "the last token is always computed: its logits are wanted"
    assert cached(None, text[:16]) == 12


def test_names_tell_digest_and_salt_apart() -> None:
    """vllm#44701: an adapter's name and a salt that make the same key."""
    names = set()
    for digest, salt in [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc")]:
        row = GenerationSequence([1] * 4, FakePrompt(digest, 4) if digest else None, salt)  # type: ignore[arg-type]
        names.add(row.block_names(row.num_virtual_tokens // 4, row.num_virtual_tokens // 4 + 1, 4)[0])
    assert len(names) == 4


def test_twins_compute_their_text_once() -> None:
    scheduler = Scheduler(BlockManager(100, 4), 8, 64)
    rows = [sequence(None, 18) for _ in range(5)]
    for row in rows:
        scheduler.add(row)
    first = scheduler.schedule()
    assert [row.sequence for row in first.rows] == rows[:1]
    run(scheduler, first)
    second = scheduler.schedule()
    check(scheduler)
    assert {row.sequence: row.num_tokens for row in second.rows if row.sequence is not rows[0]} == dict.fromkeys(
        rows[1:], 2
    )


def test_twins_do_not_wait_for_one_that_was_aborted() -> None:
    scheduler = Scheduler(BlockManager(100, 4), 8, 8)
    rows = [sequence(None, 18) for _ in range(2)]
    for row in rows:
        scheduler.add(row)
    run(scheduler, scheduler.schedule())
    scheduler.remove(rows[0])
    assert [row.sequence for row in scheduler.schedule().rows] == [rows[1]]
    check(scheduler)


def test_known_text_gives_way_to_new_text_oldest_first() -> None:
    blocks = BlockManager(1 + 3, 4)
    for name in (b"a", b"b", b"c"):
        table = blocks.allocate(1)
        assert table is not None
        blocks.name(table[0], name)
        blocks.release(table)
    (reused,) = blocks.find([b"a"])
    blocks.release([reused])
    assert blocks.allocate(1) is not None
    assert [blocks.knows(name) for name in (b"a", b"b", b"c")] == [True, False, True]


def test_loads_of_many_tasks_take_no_more_blocks_than_a_step_can_fill() -> None:
    """They can be neither evicted nor preempted, so streams would have to make room for them."""
    scheduler = Scheduler(BlockManager(1 + 40, 4), 8, 16)
    stream = sequence(None, 4, 60)
    scheduler.add(stream)
    for row in run(scheduler, scheduler.schedule()):
        row.sequence.append(7, None)  # type: ignore[attr-defined]
    for i in range(10):
        scheduler.add(sequence(FakePrompt(f"sha256:{i}", 24, "embedding"), 2, 2))
    bare = sequence(None, 3, 2, token=5)
    scheduler.add(bare)
    started = False
    for _ in range(400):
        if not scheduler.has_work:
            break
        step = scheduler.schedule()
        assert sum(len(load.block_table) for load in scheduler.loading.values()) <= 4 * 3
        started = started or any(row.sequence is bare for row in step.rows)
        assert started, "the bare base model has no prompt to wait for"
        for row in run(scheduler, step):
            if row.num_logits and row.sequence.append(7, None):  # type: ignore[attr-defined]
                scheduler.remove(row.sequence)
        check(scheduler)
    assert not scheduler.has_work and scheduler.num_preemptions == 0


def test_a_load_gives_up_its_blocks_before_a_stream_does() -> None:
    scheduler = Scheduler(BlockManager(1 + 8, 4), 8, 64)
    stream = sequence(None, 4, 20)
    scheduler.add(stream)
    for row in run(scheduler, scheduler.schedule()):
        row.sequence.append(7, None)  # type: ignore[attr-defined]
    waiting = sequence(FakePrompt("sha256:a", 24, "embedding"), 2, 2)
    scheduler.add(waiting)
    step = scheduler.schedule()  # six blocks for the prompt, a second one for the stream
    assert {type(row.sequence) for row in step.rows} == {GenerationSequence, PromptSequence}
    stream.token_ids += [7] * 4
    stream.num_computed_tokens = stream.num_tokens - 1
    step = scheduler.schedule()
    assert [row.sequence for row in step.rows] == [stream] and scheduler.num_preemptions == 0
    assert list(scheduler.waiting) == [waiting]
    check(scheduler)
