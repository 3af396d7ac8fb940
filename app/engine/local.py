"""The engine in this process: one thread owns the model and every sequence.

Other threads only put commands into its inbox; results come back through callbacks into their event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from app.engine import EngineStats, SamplingParams
from app.engine.block_manager import BlockManager
from app.engine.core import EngineCore
from app.engine.generation import LocalGeneration, post
from app.engine.kv_cache import KVCache
from app.engine.model_runner import ModelRunner
from app.engine.scheduler import Scheduler
from app.engine.sequence import ContextSequence, GenerationSequence, Score
from app.errors import ContextLengthExceeded, EngineFailed, InvalidRequest, NotReady, Overloaded
from app.soft_prompt import BaseInfo, SoftPrompt

log = logging.getLogger(__name__)

IDLE_TURN = 0.5  # seconds between signs of life of an idle engine
BLOCK_SIZE = 16  # positions
CPU_CACHE_BYTES = 2**30
GPU_CACHE_SHARE = 0.8  # of the memory that the model leaves free


class LocalEngine:
    """Implements `app.engine.Engine` over a transformers model."""

    def __init__(
        self,
        model: Any,
        info: BaseInfo,
        *,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        max_waiting: int = 256,
        kv_cache_tokens: int | None = None,
    ) -> None:
        """`model` is a frozen `PreTrainedModel`; `kv_cache_tokens` None takes a share of the memory."""
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if trainable:
            raise ValueError(f"the base model must be frozen; {trainable[0]} requires grad")
        self._info = info
        self._max_in_flight = max_num_seqs + max_waiting
        num_blocks = 1 + -(-(kv_cache_tokens or _default_cache_tokens(model, info)) // BLOCK_SIZE)
        cache = KVCache(info, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=model.dtype, device=model.device)
        self._blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self._scheduler = Scheduler(self._blocks, max_num_seqs, max(max_num_batched_tokens, max_num_seqs))
        self._core = EngineCore(self._blocks, self._scheduler, ModelRunner(model, info, cache))
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._door = threading.Lock()  # guards the two below; held for a moment only
        self._open = False
        self._num_in_flight = 0
        self._score_ids = itertools.count()
        self._last_turn = time.monotonic()

    @property
    def max_model_len(self) -> int:
        """What fits both the model and the KV cache, whatever the soft prompt (a copied block is set aside)."""
        return min(self._info.max_model_len, (self._blocks.num_usable_blocks - 1) * BLOCK_SIZE)

    def start(self) -> None:
        """Check the model once, then start the thread. Raises InvalidBaseModel."""
        blocks = self._blocks.allocate(2)
        if blocks is None:
            raise ValueError(f"the KV cache needs at least {2 * BLOCK_SIZE} tokens")
        self._core.runner.self_check(blocks)
        self._blocks.release(blocks)
        self._open = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; whatever is still in flight gets NotReady. Idempotent."""
        with self._door:
            self._open = False
        self._inbox.put(lambda: None)  # wakes an idle thread
        if self._thread is not None:
            self._thread.join()

    def generate(
        self,
        prompt: SoftPrompt | None,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        on_release: Callable[[], None] | None = None,
    ) -> LocalGeneration:
        """See `Engine.generate`. Needs a running event loop."""
        self._check(prompt, token_ids, params.max_tokens)
        generation = LocalGeneration()
        sequence = GenerationSequence(list(token_ids), prompt, params=params, emit=generation.emit)
        self._submit(sequence, on_release)
        generation.cancel = lambda: self._inbox.put(lambda: self._core.abort(sequence))
        return generation

    async def score(
        self,
        prompt: SoftPrompt | None,
        token_ids: Sequence[int],
        continuations: Sequence[Sequence[int]],
        *,
        on_release: Callable[[], None] | None = None,
    ) -> list[list[float]]:
        """See `Engine.score`. Cancelling the call aborts the scoring."""
        if not continuations or not all(continuations):
            raise InvalidRequest("every continuation must have at least one token", param="continuations")
        for tokens in continuations:
            self._check_ids(tokens)
        self._check(prompt, token_ids, max(map(len, continuations)))
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[list[float]]] = loop.create_future()
        score = Score(
            key=f"score:{next(self._score_ids)}",
            prompt=prompt,
            continuations=[list(tokens) for tokens in continuations],
            finish=lambda result: post(loop, future, result),
        )
        context = ContextSequence(list(token_ids), prompt, score=score)
        self._submit(context, on_release)
        try:
            return await future
        finally:
            self._inbox.put(lambda: self._core.abort(context))

    async def load(self, prompt: SoftPrompt) -> None:
        """See `Engine.load`. Raises NumericalError, Overloaded, ContextLengthExceeded, NotReady, EngineFailed."""
        self._check(prompt, [0], 1)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def command() -> None:
            try:
                if not self._open:
                    raise NotReady("the engine has stopped")
                self._core.load(prompt)
            except Exception as error:
                post(loop, future, error)
            else:
                post(loop, future, None)

        with self._door:
            self._enter(command)
        await future

    async def unload(self, digest: str) -> None:
        """See `Engine.unload`."""
        with self._door:
            self._enter(lambda: self._core.unload(digest))

    def stats(self) -> EngineStats:
        """Counters read without a lock: each is right, together they may be a step apart."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_total=self._blocks.num_usable_blocks,
            kv_blocks_used=self._blocks.num_used_blocks,
            prefixes=self._blocks.num_prefixes,
            prefix_loads=self._core.num_loads,
            prefix_evictions=self._blocks.num_evictions,
            preemptions=self._scheduler.num_preemptions,
            steps=self._core.num_steps,
            seconds_since_progress=time.monotonic() - self._last_turn,
        )

    # -- at the door -----------------------------------------------------------------------------------------------

    def _check(self, prompt: SoftPrompt | None, token_ids: Sequence[int], max_tokens: int) -> None:
        if not token_ids:
            raise InvalidRequest("the input has no tokens", param="input")
        self._check_ids(token_ids)
        virtual = prompt.num_virtual_tokens if prompt else 0
        total = virtual + len(token_ids) + max_tokens
        if total > self._info.max_model_len or not self._blocks.fits_alone(virtual, total):
            # A partial last block of the soft prompt is copied.
            room = (self._blocks.num_usable_blocks - bool(virtual % BLOCK_SIZE)) * BLOCK_SIZE
            limit, owner = min((self._info.max_model_len, "the model"), (room, "the KV cache"))
            raise ContextLengthExceeded(
                f"{virtual} virtual tokens + {len(token_ids)} text tokens + up to {max_tokens} new ones make {total}; "
                f"the limit is {limit}, set by {owner}",
                param="input",
            )

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        bad = next((i for i in token_ids if not 0 <= i < self._info.vocab_size), None)
        if bad is not None:
            raise InvalidRequest(f"token id {bad} is not in the vocabulary of {self._info.vocab_size}", param="input")

    def _submit(self, sequence: GenerationSequence | ContextSequence, on_release: Callable[[], None] | None) -> None:
        def release() -> None:
            with self._door:
                self._num_in_flight -= 1
            try:
                if on_release is not None:
                    on_release()
            except Exception:  # the caller's bug must not reach the other requests
                log.exception("on_release failed")

        with self._door:
            if self._num_in_flight >= self._max_in_flight:
                raise Overloaded(f"{self._num_in_flight} requests are in flight, which is the limit")
            self._enter(lambda: self._core.add(sequence, release))
            self._num_in_flight += 1

    def _enter(self, command: Callable[[], None]) -> None:
        if not self._open:
            raise NotReady("the engine is not running")
        self._inbox.put(command)

    # -- the engine thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: Exception = NotReady("the engine has stopped")
        try:
            while self._open:
                self._obey(wait=not self._core.has_work)
                if self._core.has_work:
                    self._core.step()
                self._last_turn = time.monotonic()
        except Exception as crash:
            log.exception("the engine thread died")
            error = EngineFailed(f"the engine thread died: {type(crash).__name__}")
        with self._door:
            self._open = False
        try:
            self._obey(wait=False)  # what came in before the door closed gets the error too
        finally:
            self._core.fail_all(error)

    def _obey(self, *, wait: bool) -> None:
        """Carry out the inbox's commands; with `wait`, give one a moment to arrive."""
        try:
            self._inbox.get(block=wait, timeout=IDLE_TURN if wait else None)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return


def _default_cache_tokens(model: Any, info: BaseInfo) -> int:
    """Positions that fit the default share of memory, at least one whole context."""
    per_token: int = info.num_layers * 2 * info.num_kv_heads * info.head_dim * model.dtype.itemsize
    memory = CPU_CACHE_BYTES
    if model.device.type == "cuda":
        memory = int(torch.cuda.mem_get_info(model.device)[0] * GPU_CACHE_SHARE)
    return max(memory // per_token, info.max_model_len + 2 * BLOCK_SIZE)
