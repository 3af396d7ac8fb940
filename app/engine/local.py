"""The engine in this process: one thread owns the model and every sequence.

Other threads only put commands into its inbox; results come back through callbacks into their event loop. When a bug
ends the thread's work, everyone who waits is told, and it starts anew with empty books.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from app.engine import Constraint, EngineStats, SamplingParams
from app.engine.backend import Quantization
from app.engine.block_manager import BlockManager
from app.engine.core import is_fatal
from app.engine.generation import LocalGeneration, Outbox, post
from app.engine.in_flight import InFlight
from app.engine.limits import Limits
from app.engine.loaded_model import LoadedModel
from app.engine.restarts import RESTART_DELAY, Restarts
from app.engine.scheduler import Scheduler
from app.engine.sequence import ContextSequence, GenerationSequence, Score
from app.errors import EngineFailed, InvalidRequest, NotReady
from app.soft_prompt import BaseInfo, SoftPrompt

log = logging.getLogger(__name__)

IDLE_TURN = 0.5  # seconds between signs of life of an idle engine
HOST_CACHE_BYTES = 2**30


class LocalEngine:
    """Implements `app.engine.Engine` over a transformers model."""

    def __init__(
        self,
        model: Any,
        info: BaseInfo,
        *,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        max_waiting: int = 256,
        kv_cache_tokens: int | None = None,
        host_cache_bytes: int = HOST_CACHE_BYTES,
        quantization: Quantization | None = None,
        cache_dir: Path | None = None,
        restart_delay: float = RESTART_DELAY,
    ) -> None:
        """`model` is a frozen `PreTrainedModel`.

        `kv_cache_tokens` None takes a share of the memory; `max_num_batched_tokens` None goes by the device;
        `cache_dir` is where the native decoder is kept once it is compiled. Raises ValueError for a model that takes
        gradients, InvalidBaseModel for a quantization that cannot be had here.
        """
        self._loaded = LoadedModel(
            model,
            info,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_tokens=kv_cache_tokens,
            host_cache_bytes=host_cache_bytes,
            quantization=quantization,
            cache_dir=cache_dir,
        )
        self._num_torch_threads = torch.get_num_threads()
        self._core = self._loaded.new_core()
        self._limits = Limits(info, self._blocks)
        self._outbox = Outbox()
        self._restarts = Restarts(restart_delay)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._door = threading.Lock()  # guards the next three; held for a moment only
        self._open = False
        self._stopping = threading.Event()
        self._in_flight = InFlight(max_num_seqs + max_waiting)
        self._score_ids = itertools.count()
        self._last_turn = time.monotonic()

    @property
    def max_model_len(self) -> int:
        """See `Engine.max_model_len`."""
        return self._limits.max_model_len

    @property
    def backend(self) -> str:
        """See `Engine.backend`."""
        return self._loaded.describe

    @property
    def weight_bytes(self) -> int | None:
        """How many a step of one row reads; None where that is not known."""
        return self._loaded.weight_bytes

    @property
    def _blocks(self) -> BlockManager:
        return self._core.blocks

    @property
    def _scheduler(self) -> Scheduler:
        return self._core.scheduler

    def start(self) -> None:
        """Check the model once, then start the thread. Raises InvalidBaseModel."""
        self._loaded.check(self._blocks)
        if self._loaded.is_native:
            # Its threads and those that torch would keep spinning after every operation fight for the same cores.
            torch.set_num_threads(1)
        self._open = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; whatever is still in flight gets NotReady. Idempotent."""
        with self._door:
            self._open = False
            self._stopping.set()
        self._inbox.put(lambda: None)  # wakes an idle thread
        if self._thread is not None:
            self._thread.join()
        torch.set_num_threads(self._num_torch_threads)

    def check_room(self, digest: str | None, *, ahead: int = 0) -> None:
        """See `Engine.check_room`."""
        with self._door:
            self._check_open()
            self._in_flight.check(digest, ahead=ahead)

    def generate(
        self,
        prompt: SoftPrompt | None,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        constraint: Constraint | None = None,
        salt: str = "",
        on_release: Callable[[], None] | None = None,
    ) -> LocalGeneration:
        """See `Engine.generate`. Needs a running event loop."""
        self._limits.check(prompt, token_ids, params.max_tokens)
        self._limits.check_ids(params.logit_bias, param="logit_bias")
        generation = LocalGeneration(self._outbox)
        sequence = GenerationSequence(
            list(token_ids), prompt, salt, params=params, constraint=constraint, emit=generation.emit
        )
        self._submit(sequence, on_release)
        generation.cancel = lambda: self._inbox.put(lambda: self._core.abort(sequence))
        return generation

    async def score(
        self,
        prompt: SoftPrompt | None,
        token_ids: Sequence[int],
        continuations: Sequence[Sequence[int]],
        *,
        salt: str = "",
        on_release: Callable[[], None] | None = None,
    ) -> list[list[float]]:
        """See `Engine.score`. Cancelling the call aborts the scoring."""
        if not continuations or not all(continuations):
            raise InvalidRequest("every continuation must have at least one token", param="continuations")
        for tokens in continuations:
            self._limits.check_ids(tokens)
        self._limits.check(prompt, token_ids, max(map(len, continuations)))
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[list[float]]] = loop.create_future()
        score = Score(
            key=f"score:{next(self._score_ids)}",
            prompt=prompt,
            continuations=[list(tokens) for tokens in continuations],
            finish=lambda result: post(loop, future, result),
        )
        context = ContextSequence(list(token_ids), prompt, salt, score=score)
        self._submit(context, on_release)
        try:
            return await future
        finally:
            self._inbox.put(lambda: self._core.abort(context))

    async def load(self, prompt: SoftPrompt) -> None:
        """See `Engine.load`. Raises NumericalError, Overloaded, ContextLengthExceeded, NotReady, EngineFailed.

        A prompt can be finite and still break the model, so one token is generated behind it.
        """
        async for _ in self.generate(prompt, [0], SamplingParams(max_tokens=1, temperature=0)):
            pass

    async def unload(self, digest: str) -> None:
        """See `Engine.unload`."""
        with self._door:
            self._enter(lambda: self._core.unload(digest))

    def stats(self) -> EngineStats:
        """Counters read without a lock: each is right, together they may be a step apart."""
        core = self._core
        blocks, scheduler = core.blocks, core.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_blocks_total=blocks.num_usable_blocks,
            kv_blocks_used=blocks.num_used_blocks,
            prefixes=blocks.num_prefixes,
            prefix_loads=core.num_loads,
            prefix_evictions=blocks.num_evictions,
            prefix_bytes=blocks.num_soft_prompt_blocks * self._loaded.block_bytes,
            queried_tokens=scheduler.num_queried_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            prefixes_in_host_memory=len(core.runner.host),
            host_bytes=core.runner.host.num_bytes,
            preemptions=scheduler.num_preemptions,
            steps=core.num_steps,
            ready=self._open,
            given_up=self._restarts.exhausted,
            restarts=self._restarts.count,
            seconds_since_progress=time.monotonic() - self._last_turn,
        )

    # -- at the door -----------------------------------------------------------------------------------------------

    def _submit(self, sequence: GenerationSequence | ContextSequence, on_release: Callable[[], None] | None) -> None:
        digest = sequence.prompt.digest if sequence.prompt else None

        def release() -> None:
            with self._door:
                self._in_flight.remove(digest)
            try:
                if on_release is not None:
                    on_release()
            except Exception:  # the caller's bug must not reach the other requests
                log.exception("on_release failed")

        with self._door:
            self._in_flight.check(digest)
            self._enter(lambda: self._core.add(sequence, release))
            self._in_flight.add(digest)

    def _check_open(self) -> None:
        if not self._open:
            raise NotReady("the engine is not running")

    def _enter(self, command: Callable[[], None]) -> None:
        self._check_open()
        self._inbox.put(command)

    # -- the engine thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            error: Exception = NotReady("the engine has stopped")
            try:
                self._turn()
            except Exception as crash:
                log.exception("the engine died")
                error = EngineFailed(f"the engine died: {type(crash).__name__}")
                if is_fatal(crash):
                    self._restarts.exhausted = True
            with self._door:
                self._open = False
            self._obey_all()  # what came in before the door closed gets the error too
            self._core.fail_all(error)
            self._outbox.flush()
            if not self._restart():
                return

    def _turn(self) -> None:
        while self._open:
            self._obey(wait=not self._core.has_work)
            if self._core.has_work:
                # What the last step found goes out while the model runs: the event loop's work on it would otherwise
                # hold the interpreter's lock just when this thread needs it to go on.
                self._core.step(before_run=self._outbox.flush)
            if not self._core.has_work:
                self._outbox.flush()
            self._last_turn = time.monotonic()

    def _obey_all(self) -> None:
        while not self._inbox.empty():
            try:
                self._inbox.get_nowait()()
            except Exception:
                log.exception("a command failed after the engine had died")

    def _restart(self) -> bool:
        """Begin anew after a while, unless the engine was stopped or dies again and again."""
        if self._stopping.is_set():
            return False
        delay = self._restarts.next_delay()
        if delay is None:
            log.critical("the engine died again and again and stays down")
            return False
        if self._stopping.wait(delay):
            return False
        core = self._loaded.new_core()
        core.count_on_from(self._core)
        self._core = core
        with self._door:
            if self._stopping.is_set():
                return False
            self._open = True
        log.warning("the engine has started again")
        return True

    def _obey(self, *, wait: bool) -> None:
        """Carry out the inbox's commands; with `wait`, give one a moment to arrive."""
        try:
            self._inbox.get(block=wait, timeout=IDLE_TURN if wait else None)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return
