"""The engine with its thread: admission, cancelling, failures, hot swaps, and a base that never changes."""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

from app.engine import SamplingParams, Token
from app.engine.local import LocalEngine
from app.engine.sequence import PromptSequence
from app.errors import (
    ContextLengthExceeded,
    EngineFailed,
    InvalidBaseModel,
    InvalidRequest,
    NotReady,
    NumericalError,
    Overloaded,
)
from app.soft_prompt import BaseInfo, SoftPrompt
from tests.peft_oracle import PEFT_TYPES, oracle_generate, read_folder, save_adapter
from tests.tiny import ARCHITECTURES, VOCAB_SIZE, random_prompt, tiny_info, tiny_model

pytestmark = pytest.mark.anyio

TEXT = [3, 1, 4, 1, 5]


def greedy(max_tokens: int = 10, **params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **params)


async def collect(generation: AsyncIterator[Token]) -> list[int]:
    return [token.id async for token in generation if token.id is not None]


def weights_digest(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(name.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


class Releases:
    """Counts calls of on_release, from whatever thread."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.count += 1

    async def wait_for(self, count: int) -> None:
        for _ in range(500):
            if self.count >= count:
                break
            await asyncio.sleep(0.01)
        assert self.count == count


@pytest.fixture
def start() -> Any:
    """Start engines on a tiny Llama; they are stopped, and must be empty, at the end."""
    engines: list[LocalEngine] = []

    def _start(model: PreTrainedModel | None = None, **options: Any) -> LocalEngine:
        model = model or tiny_model("llama")
        engine = LocalEngine(model, tiny_info(model), **({"kv_cache_tokens": 2_048} | options))
        engine.start()
        engines.append(engine)
        return engine

    yield _start
    for engine in engines:
        deadline = time.monotonic() + 10
        while engine._core.has_work and engine._open and time.monotonic() < deadline:
            time.sleep(0.01)
        engine.stop()
        if engine._core.scheduler.running or engine._core.scheduler.waiting:
            continue  # stopped or killed in the middle, by the test
        for prefix in list(engine._blocks._prefixes.values()):
            assert prefix.users == 0
            engine._blocks.drop(prefix)
        assert engine._blocks.num_used_blocks == 0


def step_hook(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, hook: Callable[[Any], None]) -> None:
    """Call `hook(rows)` before the model runs them."""
    run = engine._core.runner.run
    monkeypatch.setattr(engine._core.runner, "run", lambda rows: (hook(rows), run(rows))[1])


async def test_tokens_stream_and_end_with_a_reason(start: Any) -> None:
    engine = start()
    releases = Releases()
    generation = engine.generate(None, TEXT, greedy(5), on_release=releases)
    tokens = [token async for token in generation]
    assert [token.finish_reason for token in tokens] == [None] * 4 + ["length"]
    stop = tokens[2].id
    first = [token.id for token in tokens].index(stop)
    again = [
        t async for t in engine.generate(None, TEXT, greedy(5, stop_token_ids=frozenset({stop})), on_release=releases)
    ]
    assert again[:-1] == tokens[:first]
    assert again[-1] == Token(None, "stop")
    await releases.wait_for(2)


async def test_the_same_seed_gives_the_same_tokens_in_any_company(start: Any) -> None:
    engine = start()
    prompt = random_prompt(1)
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=42)
    alone = await collect(engine.generate(prompt, TEXT, params))
    others = [engine.generate(random_prompt(i % 3), [i + 1] * 9, SamplingParams(max_tokens=15)) for i in range(12)]
    crowd = await asyncio.gather(collect(engine.generate(prompt, TEXT, params)), *map(collect, others))
    assert crowd[0] == alone
    different = await collect(engine.generate(prompt, TEXT, SamplingParams(max_tokens=20, seed=43)))
    assert different != alone


async def test_a_stream_keeps_its_version_while_the_task_is_replaced(start: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    engine = start(model)
    info = tiny_info(model)
    folders = [save_adapter(model, tmp_path / str(i), "PROMPT_TUNING", 20, seed=i) for i in range(2)]
    old, new = (read_folder(folder, info).prompt for folder in folders)
    stream = engine.generate(old, TEXT, greedy(40))
    tokens = [await anext(stream)]
    await engine.unload(old.digest)  # the task now names another version
    await engine.load(new)
    after = await collect(engine.generate(new, TEXT, greedy(40)))
    tokens += [token async for token in stream]
    assert [token.id for token in tokens] == oracle_generate_quietly(model, folders[0], 40)
    assert after == oracle_generate_quietly(model, folders[1], 40)


def oracle_generate_quietly(model: PreTrainedModel, folder: Path, count: int) -> list[int]:
    with pytest.warns(UserWarning, match="Position ids are not supported"):
        return oracle_generate(model, folder, TEXT, count)


async def test_prompts_are_computed_once_however_many_rows_use_them(start: Any) -> None:
    engine = start()
    prompts = [random_prompt(1), random_prompt(2, length=40)]
    jobs = [collect(engine.generate(prompts[i % 2], [i + 1], greedy(5))) for i in range(20)]
    await asyncio.gather(*jobs)
    await engine.load(prompts[0])
    assert engine.stats().prefix_loads == 2
    assert engine.stats().prefixes == 2
    await engine.unload(prompts[0].digest)
    await engine.load(prompts[1])
    assert engine.stats().prefixes == 1


async def test_more_prompts_than_the_cache_holds(start: Any) -> None:
    engine = start(kv_cache_tokens=160, max_num_seqs=4)
    prompts = [random_prompt(i, length=20) for i in range(12)]
    expected = [await collect(engine.generate(prompt, TEXT, greedy(30))) for prompt in prompts]
    mixed = await asyncio.gather(*[collect(engine.generate(p, TEXT, greedy(30))) for p in prompts for _ in (0, 1)])
    assert mixed == [tokens for tokens in expected for _ in (0, 1)]
    stats = engine.stats()
    assert stats.prefix_evictions > 0 and stats.preemptions > 0, "the test did not press"


async def test_closing_frees_everything_at_once(start: Any) -> None:
    engine = start()
    releases = Releases()
    before = engine.stats().kv_blocks_used
    running = [engine.generate(None, TEXT, greedy(400), on_release=releases) for _ in range(4)]
    for generation in running:
        await anext(generation)
        await generation.aclose()
        await generation.aclose()
    await releases.wait_for(4)
    assert engine.stats().kv_blocks_used == before and engine.stats().running == 0
    assert engine.stats().steps < 100, "they ran on to their end"
    assert [token async for token in running[0]] == []


async def test_closing_before_the_first_token(start: Any) -> None:
    engine = start(max_num_seqs=1)
    releases = Releases()
    long = engine.generate(None, TEXT, greedy(300), on_release=releases)
    queued = engine.generate(None, TEXT, greedy(300), on_release=releases)
    await queued.aclose()
    await long.aclose()
    await releases.wait_for(2)


async def test_a_cancelled_score_is_released(start: Any) -> None:
    engine = start(max_num_seqs=1)
    releases = Releases()
    long = engine.generate(None, TEXT, greedy(400))
    task = asyncio.create_task(engine.score(random_prompt(1), TEXT, [[1, 2], [3]], on_release=releases))
    await anext(long)
    task.cancel()
    await releases.wait_for(1)
    await long.aclose()


async def test_scores_in_a_small_cache_equal_scores_in_a_large_one(start: Any) -> None:
    small, large = start(kv_cache_tokens=96, max_num_seqs=3), start()
    prompt = random_prompt(1, length=20)
    continuations = [[i, i + 1, i + 2] * 3 for i in range(1, 12)]
    jobs = [(prompt, [9] * 30), (None, [8] * 40), (prompt, [7] * 3)]
    found = await asyncio.gather(*[small.score(p, text, continuations) for p, text in jobs])
    expected = await asyncio.gather(*[large.score(p, text, continuations) for p, text in jobs])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=0)


async def test_a_score_whose_context_leaves_no_room_is_computed_without_it(start: Any) -> None:
    continuations = [[1] * 8, [2] * 8, [3]]
    tight = await start(kv_cache_tokens=48).score(None, [9] * 40, continuations)
    roomy = await start().score(None, [9] * 40, continuations)
    for ours, theirs in zip(tight, roomy, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("length", "text", "new", "fits"), [(7, 500, 5, True), (7, 500, 6, False), (0, 512, 1, False)])
async def test_context_length_counts_virtual_tokens(start: Any, length: int, text: int, new: int, fits: bool) -> None:
    engine = start()
    prompt = random_prompt(1, length) if length else None
    releases = Releases()
    if fits:
        generation = engine.generate(prompt, [1] * text, greedy(new), on_release=releases)
        assert len(await collect(generation)) == new
    else:
        with pytest.raises(ContextLengthExceeded, match="the limit is 512, set by the model") as caught:
            engine.generate(prompt, [1] * text, greedy(new), on_release=releases)
        assert f"{length} virtual tokens" in caught.value.message
        assert releases.count == 0


async def test_what_can_be_refused_is_refused_at_the_door(start: Any) -> None:
    engine = start(max_num_seqs=1, max_waiting=1)
    for bad in ([], [VOCAB_SIZE], [-1]):
        with pytest.raises(InvalidRequest):
            engine.generate(None, bad, greedy())
    with pytest.raises(InvalidRequest) as caught:
        engine.generate(None, TEXT, greedy(logit_bias={VOCAB_SIZE: 1.0}))
    assert caught.value.param == "logit_bias"
    with pytest.raises(InvalidRequest, match="continuation"):
        await engine.score(None, TEXT, [[1], []])
    held = [engine.generate(None, TEXT, greedy(300)) for _ in range(2)]
    with pytest.raises(Overloaded):
        engine.generate(None, TEXT, greedy())
    for generation in held:
        await generation.aclose()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((7, 32), float("nan")),  # found when it is loaded
        torch.full((3, 2, 2, 7, 8), 3e38),  # finite, but not what attention makes of it: found by its logits
    ],
    ids=["embedding", "kv"],
)
async def test_a_prompt_that_breaks_the_model_fails_alone(start: Any, tensor: torch.Tensor) -> None:
    engine = start()
    bad = SoftPrompt("embedding" if tensor.dim() == 2 else "kv", tensor, digest="sha256:bad")
    good = random_prompt(1)
    expected = await collect(engine.generate(good, TEXT, greedy(30)))
    with pytest.raises(NumericalError):
        await engine.load(bad)
    beside = engine.generate(good, TEXT, greedy(30))
    first = await anext(beside)
    releases = Releases()
    for _ in range(3):
        with pytest.raises(NumericalError):
            await collect(engine.generate(bad, TEXT, greedy(), on_release=releases))
        with pytest.raises(NumericalError):
            await engine.score(bad, TEXT, [[1, 2]], on_release=releases)
    assert [first.id, *await collect(beside)] == expected
    await releases.wait_for(6)


async def test_blocks_that_held_nan_are_clean_for_the_next_row(start: Any) -> None:
    """A masked position has weight 0, and 0 * NaN is NaN: stale blocks would poison whoever gets them."""
    engine = start(kv_cache_tokens=96)
    expected = [await collect(engine.generate(None, TEXT * n, greedy(20))) for n in (1, 4)]
    poisonous = SoftPrompt("kv", torch.full((3, 2, 2, 40, 8), 3e38), digest="sha256:bad")
    for round in range(6):
        with pytest.raises(NumericalError):
            await collect(engine.generate(poisonous, TEXT, greedy(20)))
        for number in range(4):
            length = (3, 20)[number % 2]  # 13 or 12 slots of the last block are stale, in every block in turn
            await engine.load(random_prompt(4 * round + number, length))
        assert [await collect(engine.generate(None, TEXT * n, greedy(20))) for n in (1, 4)] == expected


async def test_a_failing_on_release_hurts_nobody_else(start: Any) -> None:
    engine = start()

    def fail() -> None:
        raise RuntimeError("the caller's bug")

    beside = engine.generate(None, TEXT, greedy(30))
    assert len(await collect(engine.generate(None, TEXT, greedy(3), on_release=fail))) == 3
    assert len(await collect(beside)) == 30


async def test_closing_wakes_a_waiting_reader(start: Any) -> None:
    engine = start(max_num_seqs=1)
    long = engine.generate(None, TEXT, greedy(300))
    queued = engine.generate(None, TEXT, greedy(300))
    reader = asyncio.create_task(collect(queued))
    await asyncio.sleep(0.01)
    await queued.aclose()
    assert await asyncio.wait_for(reader, timeout=5) == []
    await long.aclose()


async def test_an_exception_in_a_step_fails_the_row_that_causes_it_alone(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    expected = await collect(engine.generate(None, TEXT, greedy(30)))
    warm = SamplingParams(max_tokens=30, temperature=1.0, seed=3)
    drawn = await collect(engine.generate(None, TEXT, warm))
    broken = [9, 9, 9]

    def blow(rows: Any) -> None:
        if any(row.sequence.token_ids[:3] == broken for row in rows):
            raise RuntimeError("secret detail")

    step_hook(engine, monkeypatch, blow)
    releases = Releases()
    beside = [engine.generate(None, TEXT, params, on_release=releases) for params in (greedy(30), warm)]
    with pytest.raises(EngineFailed) as caught:
        await collect(engine.generate(random_prompt(3), broken, greedy(), on_release=releases))
    assert "secret" not in caught.value.message
    with pytest.raises(EngineFailed):
        await engine.score(None, broken, [[1, 2]], on_release=releases)
    assert [await collect(generation) for generation in beside] == [expected, drawn]
    await releases.wait_for(4)


async def test_a_prompt_whose_computation_fails_fails_its_requests_alone(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    expected = await collect(engine.generate(random_prompt(1), TEXT, greedy(30)))
    bad = random_prompt(3)

    def blow(rows: Any) -> None:
        if any(isinstance(row.sequence, PromptSequence) and row.sequence.prompt is bad for row in rows):
            raise RuntimeError("no")

    step_hook(engine, monkeypatch, blow)
    beside = engine.generate(random_prompt(1), TEXT, greedy(30))
    failing = [asyncio.create_task(collect(engine.generate(bad, TEXT, greedy()))) for _ in range(3)]
    failures = await asyncio.gather(*failing, return_exceptions=True)
    assert [type(failure) for failure in failures] == [EngineFailed] * 3
    assert await collect(beside) == expected
    monkeypatch.undo()
    assert len(await collect(engine.generate(bad, TEXT, greedy(5)))) == 5, "the next request tries again"


async def test_out_of_memory_is_tried_once_more_and_fails_only_who_needs_too_much(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    prompt = random_prompt(1)
    await engine.load(prompt)
    expected = await collect(engine.generate(None, TEXT, greedy(30)))
    greedy_one = [9, 9, 9]
    fuse = [True]

    def blow(rows: Any) -> None:
        if fuse or any(row.sequence.token_ids[:3] == greedy_one for row in rows):
            fuse.clear()
            raise torch.OutOfMemoryError("no room")

    step_hook(engine, monkeypatch, blow)
    assert await collect(engine.generate(None, TEXT, greedy(30))) == expected
    beside = [engine.generate(p, TEXT, greedy(30)) for p in (None, prompt)]
    with pytest.raises(EngineFailed):
        await collect(engine.generate(None, greedy_one, greedy(30)))
    assert await collect(beside[0]) == expected
    await collect(beside[1])
    assert engine.stats().prefix_evictions == 0 and engine.stats().restarts == 0


async def test_out_of_memory_while_blocks_are_copied_hurts_nobody(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    expected = await collect(engine.generate(random_prompt(1), TEXT, greedy()))
    copy, fuse = engine._core.runner.cache.copy, [True]

    def blow(pairs: Any) -> None:
        if pairs and fuse:
            fuse.clear()
            raise torch.OutOfMemoryError("no room")
        copy(pairs)

    monkeypatch.setattr(engine._core.runner.cache, "copy", blow)
    assert await collect(engine.generate(random_prompt(1), [*TEXT[:-1], 6], greedy()))
    assert not fuse and await collect(engine.generate(random_prompt(1), TEXT, greedy())) == expected


async def test_an_error_after_which_the_device_is_lost_is_not_lived_with(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(restart_delay=0.001)

    def blow(_: Any) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    step_hook(engine, monkeypatch, blow)
    with pytest.raises(EngineFailed):
        await collect(engine.generate(None, TEXT, greedy()))
    await wait_until(lambda: engine.stats().given_up and not engine._thread.is_alive())
    assert not engine.stats().ready and engine.stats().restarts == 0


async def test_a_request_that_ends_in_broken_books_is_told_before_the_engine_dies(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(restart_delay=0.01)
    releases = Releases()
    broken = engine.generate(None, TEXT, SamplingParams(max_tokens=400), on_release=releases)
    await anext(broken)

    def die(*_: Any) -> bool:
        raise RuntimeError("the books are broken")

    monkeypatch.setattr(engine._core.scheduler, "remove", die)
    await broken.aclose()
    await releases.wait_for(1)
    await wait_until(lambda: engine.stats().restarts == 1 and engine.stats().ready)
    assert len(await collect(engine.generate(None, TEXT, greedy(5)))) == 5


async def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """Seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds
        await asyncio.sleep(0.005)
    return time.monotonic() - start


def poison_schedule(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine._core.scheduler, "schedule", die)


async def test_a_dead_engine_answers_everybody_and_starts_again(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(restart_delay=0.3)
    prompt = random_prompt(1)
    expected = await collect(engine.generate(prompt, TEXT, greedy(30)))
    for round in range(2):
        releases = Releases()
        running = [engine.generate(prompt, TEXT, greedy(400), on_release=releases) for _ in range(3)]
        for generation in running:
            await anext(generation)
        scoring = asyncio.create_task(engine.score(None, TEXT, [[1, 2]] * 500, on_release=releases))
        await asyncio.sleep(0)
        poison_schedule(engine, monkeypatch)
        assert await wait_until(lambda: not engine.stats().ready) < 1.0
        results = await asyncio.gather(*map(collect, running), scoring, return_exceptions=True)
        assert [type(result) for result in results] == [EngineFailed] * 4
        await releases.wait_for(4)
        with pytest.raises(NotReady):
            engine.generate(None, TEXT, greedy())
        with pytest.raises(NotReady):
            await engine.load(random_prompt(1))
        await wait_until(lambda: engine.stats().ready)
        assert engine.stats().restarts == round + 1
        assert await collect(engine.generate(prompt, TEXT, greedy(30))) == expected


async def test_what_comes_in_while_the_engine_dies_is_answered_too(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(restart_delay=60)
    dying, may_die = threading.Event(), threading.Event()

    def die() -> None:
        dying.set()
        may_die.wait(10)
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine._core.scheduler, "schedule", die)
    releases = Releases()
    first = engine.generate(None, TEXT, greedy(), on_release=releases)
    await asyncio.to_thread(dying.wait, 10)
    late = [engine.generate(None, TEXT, greedy(), on_release=releases) for _ in range(2)]
    await late[0].aclose()
    may_die.set()
    for generation in (first, late[1]):
        with pytest.raises(EngineFailed):
            await collect(generation)
    await releases.wait_for(3)


async def test_an_engine_that_keeps_dying_stays_down(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(restart_delay=0.001)
    for _ in range(6):
        await wait_until(lambda: engine.stats().ready)
        poison_schedule(engine, monkeypatch)
        with pytest.raises(EngineFailed):
            await collect(engine.generate(None, TEXT, greedy()))
    await wait_until(lambda: not engine._thread.is_alive())
    assert engine.stats().given_up and not engine.stats().ready and engine.stats().restarts == 5
    with pytest.raises(NotReady):
        engine.generate(None, TEXT, greedy())


async def test_counters_never_fall_when_it_starts_again(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(restart_delay=0.001, kv_cache_tokens=96, host_cache_bytes=0)
    text = [(7 * i) % VOCAB_SIZE for i in range(1, 40)]
    for seed in (1, 2, 3):
        await collect(engine.generate(random_prompt(seed, length=20), text, greedy(10)))
    await collect(engine.generate(random_prompt(3, length=20), text, greedy(10)))
    await asyncio.gather(*(collect(engine.generate(None, [i, *text], greedy(30))) for i in range(3)))
    names = ("prefix_loads", "prefix_evictions", "queried_tokens", "cached_tokens", "preemptions", "steps")
    before = {name: getattr(engine.stats(), name) for name in names}
    assert all(before.values()), before
    poison_schedule(engine, monkeypatch)
    with pytest.raises(EngineFailed):
        await collect(engine.generate(None, TEXT, greedy()))
    await wait_until(lambda: engine.stats().restarts == 1 and engine.stats().ready)
    after = {name: getattr(engine.stats(), name) for name in names}
    assert all(after[name] >= before[name] for name in names), (before, after)


async def test_times_are_those_of_the_engine(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late somebody reads them, and with the wait for a prompt that has to be computed."""
    engine = start(max_num_seqs=1)
    step_hook(engine, monkeypatch, lambda _: time.sleep(0.005))
    began = time.monotonic()
    first, second = (engine.generate(random_prompt(1), TEXT, greedy(10)) for _ in range(2))
    await asyncio.sleep(0.3)
    read_at = time.monotonic()
    mine, others = [[token async for token in generation] for generation in (first, second)]
    times = [token.made_at for token in mine + others]
    assert times == sorted(times) and began < times[0] and times[-1] < read_at
    assert mine[-1].made_at - mine[0].made_at >= 0.045
    assert 0.005 <= mine[0].queue_seconds < 0.04, "its prompt took a step"
    assert 0.05 <= others[0].queue_seconds < others[0].made_at - began
    assert {token.queue_seconds for token in mine[1:] + others[1:]} == {0.0}


async def test_text_is_looked_for_once_a_request(start: Any) -> None:
    engine = start()
    text = [(7 * i) % VOCAB_SIZE for i in range(1, 40)]
    for _ in range(2):
        await collect(engine.generate(random_prompt(1, length=16), text, greedy(5)))
    assert (engine.stats().queried_tokens, engine.stats().cached_tokens) == (78, 32)
    await engine.score(random_prompt(1, length=16), text, [[1, 2], [3, 4, 5]])
    assert (engine.stats().queried_tokens, engine.stats().cached_tokens) == (117, 64)
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    await collect(engine.generate(random_prompt(1, length=16), text, params))
    assert engine.stats().queried_tokens == 117, "who needs every position computed looks for none"


async def test_bytes_of_resident_prompts(start: Any) -> None:
    engine = start(host_cache_bytes=2**20)
    position = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dimensions, bytes
    await engine.load(random_prompt(1, length=20))
    await engine.score(random_prompt(1, length=20), TEXT, [[1, 2], [3, 4, 5]])
    assert engine.stats().prefix_bytes == 32 * position and engine.stats().host_bytes == 20 * position
    await engine.load(random_prompt(2, length=3))
    assert engine.stats().prefix_bytes == 48 * position
    await engine.unload("sha256:1")
    await wait_until(lambda: engine.stats().prefix_bytes == 16 * position)


async def test_stopping_does_not_wait_for_a_restart(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(restart_delay=60)
    poison_schedule(engine, monkeypatch)
    with pytest.raises(EngineFailed):
        await collect(engine.generate(None, TEXT, greedy()))
    await asyncio.wait_for(asyncio.to_thread(engine.stop), timeout=2)


async def test_a_constraint_that_fails_fails_its_row_alone(start: Any) -> None:
    engine = start()
    expected = await collect(engine.generate(None, TEXT, greedy(20)))

    class Broken:
        def mask(self) -> torch.Tensor:
            return torch.full((VOCAB_SIZE // 32,), -1, dtype=torch.int32)

        def accept(self, token_id: int) -> bool:
            raise RuntimeError("a bug")

    beside = engine.generate(None, TEXT, greedy(20))
    with pytest.raises(EngineFailed):
        await collect(engine.generate(None, TEXT, greedy(20), constraint=Broken()))
    assert await collect(beside) == expected


async def test_a_constraint_chooses_among_its_tokens_and_ends_the_answer(start: Any) -> None:
    class Count:
        """Allows one token more each time, and is complete after the third."""

        def __init__(self) -> None:
            self.accepted: list[int] = []

        def mask(self) -> torch.Tensor:
            words = torch.zeros(VOCAB_SIZE // 32, dtype=torch.int32)
            words[1] = 1 << len(self.accepted)  # token 32, then 33, then 34
            return words

        def accept(self, token_id: int) -> bool:
            self.accepted.append(token_id)
            return len(self.accepted) == 3

    tokens = [token async for token in start().generate(None, TEXT, greedy(20), constraint=Count())]
    assert [token.id for token in tokens] == [32, 33, 34]
    assert [token.finish_reason for token in tokens] == [None, None, "stop"]


async def test_prompt_logprobs_and_an_answer_of_no_tokens(start: Any) -> None:
    engine = start()
    prompt = random_prompt(1, length=20)
    text = [(7 * i) % VOCAB_SIZE for i in range(1, 60)]
    expected = [(await engine.score(prompt, text[:i], [[text[i]]]))[0][0] for i in range(1, len(text))]
    for max_tokens in (0, 3):  # the second time the text is in the cache, and is computed all the same
        params = SamplingParams(max_tokens=max_tokens, temperature=0, prompt_logprobs=2, logprobs=1)
        tokens = [token async for token in engine.generate(prompt, text, params)]
        assert [token.finish_reason for token in tokens] == [None] * (max_tokens - 1) + ["length"]
        found = tokens[0].prompt_logprobs
        assert found is not None and found[0] is None and [entry.id for entry in found[1:] if entry] == text[1:]
        torch.testing.assert_close(
            torch.tensor([entry.logprob for entry in found[1:] if entry]), torch.tensor(expected), atol=1e-4, rtol=0
        )
        assert all(entry is None or len(entry.top) == 2 for entry in found)
        assert all(token.prompt_logprobs is None for token in tokens[1:])
        assert all((token.logprob is None) == (token.id is None) for token in tokens)


async def test_the_first_token_says_how_much_of_the_text_was_cached(start: Any) -> None:
    engine = start()
    prompt = random_prompt(1, length=20)

    async def cached(salt: str = "") -> list[int]:
        return [token.num_cached_tokens async for token in engine.generate(prompt, [5] * 50, greedy(3), salt=salt)]

    assert await cached() == [0, 0, 0]
    assert await cached() == [44, 0, 0], "blocks of 16 from position 20 on: 12 + 2 * 16 text tokens"
    assert await cached("another tenant") == [0, 0, 0]


async def test_stop_answers_what_is_in_flight(start: Any) -> None:
    engine = start(max_num_seqs=1)
    releases = Releases()
    begun = asyncio.Event()

    async def run() -> None:
        async for _ in engine.generate(None, TEXT, greedy(400), on_release=releases):
            begun.set()

    jobs = [asyncio.create_task(run()) for _ in range(3)]
    await begun.wait()  # and no longer: 400 tokens of this model take 50 ms on a fast machine
    await asyncio.to_thread(engine.stop)
    results = await asyncio.gather(*jobs, return_exceptions=True)
    assert all(isinstance(result, NotReady) for result in results)
    await releases.wait_for(3)


async def test_an_idle_engine_shows_signs_of_life(start: Any) -> None:
    engine = start()
    await asyncio.sleep(1.2)
    assert engine.stats().seconds_since_progress < 0.7


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_no_byte_of_the_base_changes(architecture: str, start: Any, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    before = weights_digest(model)
    engine = start(model)
    info = tiny_info(model)
    for number, peft_type in enumerate(PEFT_TYPES):
        prompt = read_folder(save_adapter(model, tmp_path / peft_type, peft_type, 5, seed=number), info).prompt
        await engine.load(prompt)
        await asyncio.gather(
            collect(engine.generate(prompt, TEXT, SamplingParams(max_tokens=5))),
            engine.score(prompt, TEXT, [[1, 2], [3]]),
        )
    assert weights_digest(model) == before
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_trainable_base_is_refused() -> None:
    model = tiny_model("llama")
    info = tiny_info(model)
    next(model.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="requires grad"):
        LocalEngine(model, info, kv_cache_tokens=256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_position_ids_is_found_out_at_start(dtype: torch.dtype) -> None:
    config = BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4)
    model = BloomForCausalLM(config).to(dtype).eval().requires_grad_(False)
    info = BaseInfo("bloom", "sha256:0", "BloomForCausalLM", 32, 2, 4, 8, VOCAB_SIZE, 512)
    with pytest.raises(InvalidBaseModel, match="BloomForCausalLM cannot be served"):
        LocalEngine(model, info, kv_cache_tokens=256).start()


async def test_probabilities_of_scores_are_a_distribution(start: Any) -> None:
    scores = await start().score(random_prompt(2), TEXT, [[i] for i in range(VOCAB_SIZE)])
    assert math.isclose(sum(math.exp(logprob) for (logprob,) in scores), 1.0, abs_tol=1e-4)
