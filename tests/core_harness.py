"""Drives the engine core without its thread, and records the logits behind every token."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any
from unittest.mock import patch

import pytest
import torch

from app.engine import SamplingParams, Token, model_runner
from app.engine.block_manager import BlockManager
from app.engine.core import EngineCore
from app.engine.decoder import FusedDecoder
from app.engine.forward import Forward
from app.engine.host_cache import HostCache
from app.engine.kv_cache import KVCache
from app.engine.model_runner import ModelRunner
from app.engine.native.build import load_kernel
from app.engine.native.decoder import NativeDecoder
from app.engine.scheduler import Scheduler
from app.engine.sequence import ContextSequence, GenerationSequence, Score
from app.engine.transformers_forward import TransformersForward
from app.engine.weights import DecoderWeights, decoder_weights
from app.soft_prompt import BaseInfo, SoftPrompt

TOLERANCE = 1e-3
BACKENDS = ("transformers", "fused", "native")


def make_forward(backend: str, model: Any, info: BaseInfo, cache: KVCache) -> Forward:
    if backend == "transformers":
        return TransformersForward(model, cache)
    if backend == "native":
        with patch("app.engine.native.decoder.load_kernel", lambda _: _kernel()):
            return NativeDecoder(_weights(model, info.max_model_len), cache, quantization=None, num_threads=1)
    weights = decoder_weights(model, info.max_model_len)
    assert weights is not None, f"no fused decoder for {info.architecture}"
    return FusedDecoder(model, weights, cache)


# Thousands of harnesses, few models: the kernel is looked for once, and the weights of each model read once.
_kernel = functools.cache(load_kernel)


@functools.lru_cache(maxsize=4)
def _weights(model: Any, max_model_len: int) -> DecoderWeights:
    weights = decoder_weights(model, max_model_len)
    assert weights is not None, f"no native decoder for {type(model).__name__}"
    return weights


Answer = tuple[list[Token | Exception], list[torch.Tensor]]  # tokens, and the logits behind each


def assert_same_logits(ours: Answer, theirs: Answer, *, exact: bool) -> None:
    """To the bit, or within 1e-4 with tokens equal up to where the two best logits differ by less."""
    if exact:
        assert [without_cache(token) for token in ours[0]] == [without_cache(token) for token in theirs[0]]
        assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))
        return
    for token, expected, logits, expected_logits in zip(*ours[:1], *theirs[:1], *ours[1:], *theirs[1:], strict=True):
        assert isinstance(token, Token) and isinstance(expected, Token)
        assert (logits - expected_logits).abs().max() < 1e-4
        if token.id != expected.id:
            best = expected_logits.topk(2).values
            assert best[0] - best[1] < 1e-4
            return


def without_cache(token: Token | Exception) -> Token | Exception:
    """What it found in the cache is the one thing that may depend on the others."""
    return dataclasses.replace(token, num_cached_tokens=0) if isinstance(token, Token) else token


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
        host_cache_bytes: int = 2**20,
        backend: str = "transformers",
    ) -> None:
        cache = KVCache(info, num_blocks=num_blocks, block_size=block_size, dtype=model.dtype, device=model.device)
        self.blocks = BlockManager(num_blocks, block_size)
        forward = make_forward(backend, model, info, cache)
        runner = ModelRunner(forward, cache, HostCache(host_cache_bytes))
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs, max_num_batched_tokens, has_keys_and_values=runner.has_keys_and_values
        )
        self.core = EngineCore(self.blocks, self.scheduler, runner)
        self.tokens: dict[int, list[Token | Exception]] = {}
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.released: list[int] = []
        self.contexts: list[ContextSequence] = []  # of all scores, in order
        self._by_params: dict[int, tuple[int, SamplingParams]] = {}  # kept, so that no id is used twice
        original = model_runner.sample

        def recording(logits: torch.Tensor, rows: Any) -> Any:
            for found, row in zip(logits, rows, strict=True):
                if id(row.params) in self._by_params:  # else another harness in the same test
                    self.logits[self._by_params[id(row.params)][0]].append(found.clone())
            return original(logits, rows)

        monkeypatch.setattr(model_runner, "sample", recording)

    def add(
        self, prompt: SoftPrompt | None, token_ids: list[int], *, salt: str = "", **params: Any
    ) -> GenerationSequence:
        name = len(self.tokens)
        self.tokens[name], self.logits[name] = [], []
        sampling = SamplingParams(**({"temperature": 0.0, "max_tokens": 8} | params))
        self._by_params[id(sampling)] = (name, sampling)
        sequence = GenerationSequence(list(token_ids), prompt, salt, params=sampling, emit=self.tokens[name].append)
        self.core.add(sequence, lambda: self.released.append(name))
        return sequence

    def score(
        self, prompt: SoftPrompt | None, token_ids: list[int], continuations: list[list[int]], *, salt: str = ""
    ) -> list[Any]:
        """The list gets the result."""
        results: list[Any] = []
        score = Score(f"score:{id(results)}", prompt, continuations, results.append)
        self.contexts.append(ContextSequence(list(token_ids), prompt, salt, score=score))
        self.core.add(self.contexts[-1], lambda: None)
        return results

    def load(self, prompt: SoftPrompt) -> None:
        """As `LocalEngine.load` does, without waiting."""
        sequence = GenerationSequence([0], prompt, params=SamplingParams(max_tokens=1, temperature=0))
        self.core.add(sequence, lambda: None)

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
