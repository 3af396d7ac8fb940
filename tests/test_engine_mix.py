"""Random mixes of generations, scores, loads, unloads and aborts in a small cache: nobody waits for ever, nobody pays.

Every answer is compared with the same request alone in a roomy engine.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from app.engine.sequence import ContextSequence, GenerationSequence
from app.errors import NumericalError
from app.soft_prompt import SoftPrompt
from tests.core_harness import Harness
from tests.tiny import tiny_info, tiny_model

MODEL = tiny_model("llama")
INFO = tiny_info(MODEL)
CONTEXTS = ([7] * 8, [1, 2, 3], [9] * 17)


def prompts(count: int) -> list[SoftPrompt]:
    draw = torch.Generator().manual_seed(0)
    lengths = (8, 8, 3, 13)
    return [
        SoftPrompt("embedding", torch.randn(lengths[i], 32, generator=draw), digest=f"sha256:{i}") for i in range(count)
    ]


PROMPTS: list[SoftPrompt | None] = [*prompts(4), None]
POISON = SoftPrompt("kv", torch.full((3, 2, 2, 5, 8), 3e38), digest="sha256:poison")


def alone(kind: str, prompt: SoftPrompt | None, text: list[int], extra: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        harness = Harness(MODEL, INFO, patch)
        if kind == "score":
            results = harness.score(prompt, text, extra)
            harness.run()
            return results[0]
        harness.add(prompt, text, max_tokens=extra)
        harness.run()
        return harness.ids(0)


@pytest.mark.parametrize("seed", range(60))
def test_every_answer_is_what_it_would_be_alone(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    harness = Harness(
        MODEL,
        INFO,
        monkeypatch,
        num_blocks=rng.randint(12, 20),
        block_size=4,
        max_num_seqs=8,
        max_num_batched_tokens=24,
    )
    requests: list[tuple[str, SoftPrompt | None, list[int], Any, Any]] = []
    poisoned, name = 0, 0
    started: list[GenerationSequence | ContextSequence] = []  # to be aborted, perhaps
    for _ in range(14):
        prompt, text = rng.choice(PROMPTS), rng.choice(CONTEXTS)
        match rng.choice(["generate", "generate", "score", "score", "abort", "poison", "load", "unload"]):
            case "generate":
                count = rng.randint(1, 8)
                harness.add(prompt, text, max_tokens=count)
                requests.append(("generate", prompt, text, count, name))
                name += 1
            case "score":
                continuations = [[rng.randrange(128) for _ in range(rng.randint(1, 7))] for _ in range(3)]
                requests.append(("score", prompt, text, continuations, harness.score(prompt, text, continuations)))
            case "abort" if rng.random() < 0.5:
                started.append(harness.add(prompt, text, max_tokens=8))
                name += 1
            case "abort":
                harness.score(prompt, text, [[1, 2, 3], [4, 5, 6, 7]])
                started.append(harness.contexts[-1])
            case "poison":
                harness.add(POISON, text, max_tokens=4)
                poisoned += 1
                name += 1
            case "load" if prompt is not None:
                if harness.blocks.num_used_blocks < 4:
                    harness.core.load(prompt)
            case "unload" if prompt is not None:
                harness.core.unload(prompt.digest)
        for _ in range(rng.randint(0, 3)):
            if harness.core.has_work:
                harness.core.step()
        if started and rng.random() < 0.5:
            harness.core.abort(started.pop())
    harness.run()
    for kind, prompt, text, extra, found in requests:
        expected = alone(kind, prompt, text, extra, monkeypatch)
        if kind == "score":
            (logprobs,) = found
            for ours, theirs in zip(logprobs, expected, strict=True):
                torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=0)
        else:
            assert harness.ids(found) == expected
    failures = [token for tokens in harness.tokens.values() for token in tokens if isinstance(token, NumericalError)]
    assert len(failures) == poisoned
    assert len(harness.released) == name, "every generation releases its prompt"
    harness.assert_clean()


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
