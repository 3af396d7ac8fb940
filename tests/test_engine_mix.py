"""Random mixes of generations, scores, loads, replaces and aborts in a small cache: nobody waits for ever, nobody pays.

Every answer is compared with the same request alone in a roomy engine: the native decoder's to the bit.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from app.engine import Token
from app.engine.sequence import ContextSequence, GenerationSequence
from app.errors import NumericalError
from app.soft_prompt import SoftPrompt
from tests.core_harness import Harness, assert_same_logits
from tests.tiny import tiny_info, tiny_model

MODEL = tiny_model("llama")
INFO = tiny_info(MODEL)
CONTEXTS = ([7] * 8, [1, 2, 3], [9] * 17, [7] * 7 + [8], list(range(30)))
SALTS = ("", "tenant")
# How a generation chooses: greedily, or by a seed, with and without what looks at other tokens.
CHOICES: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "seed": 2, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 1.2, "seed": 3, "top_k": 7, "min_p": 0.05, "logit_bias": {5: 3.0}},
    {"logprobs": 2, "prompt_logprobs": 1},
)


def prompts(count: int) -> list[SoftPrompt]:
    draw = torch.Generator().manual_seed(0)
    lengths = (8, 8, 3, 13)
    return [
        SoftPrompt("embedding", torch.randn(lengths[i], 32, generator=draw), digest=f"sha256:{i}") for i in range(count)
    ]


KEYS_AND_VALUES = torch.randn(3, 2, 2, 6, 8, generator=torch.Generator().manual_seed(1))
PROMPTS: list[SoftPrompt | None] = [*prompts(4), SoftPrompt("kv", KEYS_AND_VALUES, digest="sha256:kv"), None]
POISON = SoftPrompt("kv", torch.full((3, 2, 2, 5, 8), 3e38), digest="sha256:poison")
BROKEN = SoftPrompt("embedding", torch.full((5, 32), float("nan")), digest="sha256:broken")


@dataclass(frozen=True)
class Request:
    """What was asked; the answer alone depends on this and nothing else."""

    prompt: int  # of PROMPTS
    text: int  # of CONTEXTS
    max_tokens: int = 0
    choice: int = 0  # of CHOICES
    continuations: tuple[tuple[int, ...], ...] = ()

    def start(self, harness: Harness, salt: str = "") -> Any:
        """A score's list of results, or a generation's name."""
        prompt, text = PROMPTS[self.prompt], CONTEXTS[self.text]
        if self.continuations:
            return harness.score(prompt, text, [list(tokens) for tokens in self.continuations], salt=salt)
        name = len(harness.tokens)
        harness.add(prompt, text, salt=salt, max_tokens=self.max_tokens, **CHOICES[self.choice])
        return name


@cache
def alone(request: Request, backend: str) -> Any:
    """Log-probabilities, or tokens and the logits behind each."""
    with pytest.MonkeyPatch.context() as patch:
        harness = Harness(MODEL, INFO, patch, backend=backend)
        started = request.start(harness)
        harness.run()
        if request.continuations:
            return started[0]
        return harness.tokens[started], harness.logits[started]


def run_mix(seed: int, backend: str, monkeypatch: pytest.MonkeyPatch, pressure: Counter[str]) -> int:
    """One mix; the number of sequences it compared."""
    rng = random.Random(f"{seed} {backend}")
    harness = Harness(
        MODEL,
        INFO,
        monkeypatch,
        num_blocks=rng.randint(16, 30),
        block_size=4,
        max_num_seqs=8,
        max_num_batched_tokens=rng.choice([12, 24, 64]),
        host_cache_bytes=rng.choice([0, 10_000, 2**20]),
        backend=backend,
    )
    asked: list[tuple[Request, Any]] = []
    poisoned = 0
    started: list[GenerationSequence | ContextSequence] = []  # to be aborted, perhaps
    for _ in range(14):
        number, text = rng.randrange(len(PROMPTS)), rng.randrange(len(CONTEXTS))
        prompt, salt = PROMPTS[number], rng.choice(SALTS)
        match rng.choice(["generate", "generate", "twins", "score", "score", "abort", "poison", "load", "unload"]):
            case "generate":
                request = Request(number, text, rng.randint(1, 8), rng.randrange(len(CHOICES)))
                asked.append((request, request.start(harness, salt)))
            case "twins":
                request = Request(number, text, rng.randint(1, 8), rng.randrange(len(CHOICES)))
                asked += [(request, request.start(harness, salt)) for _ in range(3)]
            case "score":
                lengths = [rng.randint(1, 7) for _ in range(3)]
                request = Request(
                    number, text, continuations=tuple(tuple(rng.choices(range(128), k=length)) for length in lengths)
                )
                asked.append((request, request.start(harness, salt)))
            case "abort" if rng.random() < 0.5:
                started.append(harness.add(prompt, CONTEXTS[text], max_tokens=8))
            case "abort":
                harness.score(prompt, CONTEXTS[text], [[1, 2, 3], [4, 5, 6, 7]])
                started.append(harness.contexts[-1])
            case "poison":
                harness.add(rng.choice([POISON, BROKEN]), CONTEXTS[text], max_tokens=4)
                poisoned += 1
            case "load" if prompt is not None:
                harness.load(prompt)
            case "unload" if prompt is not None:
                harness.core.unload(prompt.digest)
        for _ in range(rng.randint(0, 3)):
            if harness.core.has_work:
                harness.core.step()
        if started and rng.random() < 0.5:
            harness.core.abort(started.pop())
    harness.run()
    for request, found in asked:
        expected = alone(request, backend)
        if request.continuations:
            (logprobs,) = found
            for ours, theirs in zip(logprobs, expected, strict=True):
                atol = 0 if backend == "native" else 1e-4
                torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=atol, rtol=0)
        else:
            same = (harness.tokens[found], harness.logits[found])
            assert_same_logits(same, expected, exact=backend == "native")
    failures = [token for tokens in harness.tokens.values() for token in tokens if isinstance(token, NumericalError)]
    assert len(failures) == poisoned
    assert sorted(harness.released) == sorted(harness.tokens), "every generation releases its prompt, once"
    harness.assert_clean()
    first = [tokens[0] for tokens in harness.tokens.values() if tokens]
    pressure["cached"] += sum(token.num_cached_tokens for token in first if isinstance(token, Token))
    pressure["preemptions"] += harness.scheduler.num_preemptions
    pressure["evictions"] += harness.blocks.num_evictions
    return len(asked)


@pytest.mark.parametrize("chunk", range(5))
def test_every_answer_is_what_it_would_be_alone(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All chunks together: more than 1,000 sequences, to the bit; `long` has 50 times as many."""
    compared, pressure = run_mixes(range(24 * chunk, 24 * chunk + 24), "native", monkeypatch)
    assert compared >= 200
    assert pressure["preemptions"] > 0 and pressure["evictions"] > 0 and pressure["cached"] > 0, pressure


@pytest.mark.parametrize("backend", ["fused", "transformers"])
def test_the_same_within_rounding(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_mixes(range(6), backend, monkeypatch)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_same_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, _ = run_mixes(range(1_000, 6_000), "native", monkeypatch)
    assert compared > 50_000


def run_mixes(seeds: range, backend: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Counter[str]]:
    """How many sequences were compared, and how hard the mixes pressed."""
    compared, pressure = 0, Counter[str]()
    for seed in seeds:
        with monkeypatch.context() as patch:
            compared += run_mix(seed, backend, patch, pressure)
    return compared, pressure


def test_two_scores_that_share_blocks_with_idle_prompts_do_not_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harness = Harness(MODEL, INFO, monkeypatch, num_blocks=9, block_size=4, max_num_seqs=8)
    results = [
        harness.score(prompt, [7] * 8, [[5] * 10, [6] * length])
        for prompt, length in zip(prompts(2), (9, 5), strict=True)
    ]
    harness.run()
    assert all(len(result) == 1 for result in results)
    harness.assert_clean()


@pytest.mark.parametrize("num_lost", [0, 4])
def test_labels_whose_context_was_evicted_do_not_cost_a_prefill_each(
    num_lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(MODEL, INFO, monkeypatch, block_size=4, max_num_batched_tokens=200)
    run, computed = harness.core.runner.run, []
    monkeypatch.setattr(
        harness.core.runner, "run", lambda rows: (computed.extend(row.num_tokens for row in rows), run(rows))[1]
    )
    labels = [[i, i + 1] for i in range(20)]
    results = harness.score(PROMPTS[0], list(range(40)), labels, salt="tenant")
    while not harness.blocks.prefix(harness.contexts[0].score.key):
        harness.core.step()
    context = harness.blocks.prefix(harness.contexts[0].score.key)
    assert context is not None
    harness.blocks.drop(context)
    if num_lost:  # its last blocks go to others, as when it was evicted for them
        blocks = harness.blocks
        nameless = sum(block not in blocks._names for block in blocks._free)
        blocks.release(blocks.allocate(nameless + num_lost) or [])
    before, steps = sum(computed), harness.core.num_steps
    harness.run()
    # Of the context what is lost, once, and of each label what its first block that ends in the context needs.
    assert len(results) == 1 and sum(computed) - before <= 4 * num_lost + 20 * 5
    assert harness.core.num_steps - steps <= 5, "labels wait for each other"


def test_text_that_gave_broken_numbers_is_not_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a bit flip: the keys and values of a good text, and so its logits, are not finite this once."""
    harness = Harness(MODEL, INFO, monkeypatch, block_size=4)
    text = list(range(17))
    harness.add(None, text, max_tokens=3)
    harness.core.step()
    (sequence,) = harness.scheduler.running
    harness.core.runner.cache.data[:, :, harness.core.runner.cache.slots(sequence.block_table, 0, 8)] = float("nan")
    harness.run()
    assert isinstance(harness.tokens[0][-1], NumericalError)
    harness.add(None, text, max_tokens=3)
    harness.run()
    assert len(harness.ids(1)) == 3
    token = harness.tokens[1][0]
    assert isinstance(token, Token) and token.num_cached_tokens == 0
