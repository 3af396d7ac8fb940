"""Drives the engine core without its thread, and records the logits behind every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from app.engine import SamplingParams, Token, model_runner
from app.engine.block_manager import BlockManager
from app.engine.core import EngineCore
from app.engine.kv_cache import KVCache
from app.engine.model_runner import ModelRunner
from app.engine.scheduler import Scheduler
from app.engine.sequence import ContextSequence, GenerationSequence, Score
from app.soft_prompt import BaseInfo, SoftPrompt

TOLERANCE = 1e-3


class Harness:
    def __init__(
        self,
        model: Any,
        info: BaseInfo,
        monkeypatch: pytest.MonkeyPatch,
        *,
        num_blocks: int = 200,
        block_size: int = 16,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 64,
    ) -> None:
        cache = KVCache(info, num_blocks=num_blocks, block_size=block_size, dtype=model.dtype, device=model.device)
        self.blocks = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(self.blocks, max_num_seqs, max_num_batched_tokens)
        self.core = EngineCore(self.blocks, self.scheduler, ModelRunner(model, info, cache))
        self.tokens: dict[int, list[Token | Exception]] = {}
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.released: list[int] = []
        self.contexts: list[ContextSequence] = []  # of all scores, in order
        self._by_params: dict[int, tuple[int, SamplingParams]] = {}  # kept, so that no id is used twice
        original = model_runner.sample

        def recording(logits: torch.Tensor, params: Any, draws: Any) -> list[int | None]:
            for row, p in zip(logits, params, strict=True):
                if id(p) in self._by_params:  # else another harness in the same test
                    self.logits[self._by_params[id(p)][0]].append(row.clone())
            return original(logits, params, draws)

        monkeypatch.setattr(model_runner, "sample", recording)

    def add(self, prompt: SoftPrompt | None, token_ids: list[int], **params: Any) -> GenerationSequence:
        name = len(self.tokens)
        self.tokens[name], self.logits[name] = [], []
        sampling = SamplingParams(**({"temperature": 0.0, "max_tokens": 8} | params))
        self._by_params[id(sampling)] = (name, sampling)
        sequence = GenerationSequence(list(token_ids), prompt, params=sampling, emit=self.tokens[name].append)
        self.core.add(sequence, lambda: self.released.append(name))
        return sequence

    def score(self, prompt: SoftPrompt | None, token_ids: list[int], continuations: list[list[int]]) -> list[Any]:
        """The list gets the result."""
        results: list[Any] = []
        score = Score(f"score:{id(results)}", prompt, continuations, results.append)
        self.contexts.append(ContextSequence(list(token_ids), prompt, score=score))
        self.core.add(self.contexts[-1], lambda: None)
        return results

    def run(self, max_steps: int = 2_000) -> None:
        for _ in range(max_steps):
            if not self.core.has_work:
                return
            self.core.step()
        raise AssertionError(f"still at work after {max_steps} steps: deadlock")

    def ids(self, name: int) -> list[int]:
        ids = []
        for token in self.tokens[name]:
            assert isinstance(token, Token), token
            if token.id is not None:
                ids.append(token.id)
        return ids

    def assert_equals(self, name: int, token_ids: list[int], expected: torch.Tensor) -> None:
        """Logits within the tolerance, and greedy tokens equal wherever the two best logits differ by more.

        `expected` [text + new tokens, vocab_size] are the oracle's logits for `token_ids` and what was generated.
        """
        generated = self.ids(name)
        assert generated and len(expected) == len(token_ids) + len(generated)
        for step, token in enumerate(generated):
            ours, theirs = self.logits[name][step], expected[len(token_ids) - 1 + step]
            assert (ours - theirs).abs().max() < TOLERANCE, f"row {name}, step {step}"
            best = theirs.topk(2)
            if best.values[0] - best.values[1] > TOLERANCE:
                assert token == best.indices[0], f"row {name}, step {step}"

    def assert_clean(self) -> None:
        """Nothing but idle prefixes holds blocks."""
        for prefix in list(self.blocks._prefixes.values()):
            assert prefix.users == 0, prefix
            assert not prefix.key.startswith("score:"), "a scoring request has ended and left its context"
            self.blocks.drop(prefix)
        assert self.blocks.num_used_blocks == 0
        assert self.blocks._references == [0] * self.blocks.num_blocks
