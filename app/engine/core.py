"""The engine without threads: sequences in, steps, results out through each sequence's own callbacks.

A step is three calls: schedule, run, update.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from app.engine.block_manager import BlockManager, Prefix
from app.engine.model_runner import ModelRunner, StepOutput
from app.engine.scheduler import Row, Scheduler, Step
from app.engine.sequence import (
    ContextSequence,
    ContinuationSequence,
    GenerationSequence,
    PromptSequence,
    Score,
    Sequence,
)
from app.errors import EngineFailed, NumericalError, SoftpromptError

log = logging.getLogger(__name__)

T = TypeVar("T")


class EngineCore:
    """Owned by one thread."""

    def __init__(self, blocks: BlockManager, scheduler: Scheduler, runner: ModelRunner) -> None:
        self.blocks = blocks
        self.scheduler = scheduler
        self.runner = runner
        self.num_steps = 0
        self.num_loads = 0
        self._releases: dict[Sequence, Callable[[], None]] = {}  # requests that have not ended
        self._unloaded: set[str] = set()  # prompts to be forgotten once more, with the last of their requests

    def count_on_from(self, other: EngineCore) -> None:
        """What one has counted, the one that takes its place counts on: a counter that falls would look like events."""
        self.num_steps, self.num_loads = other.num_steps, other.num_loads
        self.blocks.num_evictions = other.blocks.num_evictions
        self.scheduler.num_preemptions = other.scheduler.num_preemptions
        self.scheduler.num_queried_tokens = other.scheduler.num_queried_tokens
        self.scheduler.num_cached_tokens = other.scheduler.num_cached_tokens

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, sequence: GenerationSequence | ContextSequence, on_release: Callable[[], None]) -> None:
        """Accept a request. `on_release` is called exactly once, when it has ended."""
        self._releases[sequence] = on_release
        self.scheduler.add(sequence)

    def abort(self, sequence: GenerationSequence | ContextSequence) -> None:
        """End a request without a word to its client; nothing happens if it has ended."""
        self._end(sequence)

    def fail_all(self, error: Exception) -> None:
        """End every request with an error, whatever state the rest is in."""
        while self._releases:
            sequence, on_release = self._releases.popitem()
            sequence.fail(error)
            on_release()

    def unload(self, digest: str) -> None:
        """Forget a prompt's keys and values; rows that stand on them finish first.

        Requests that have not started yet bring them back for as long as they last.
        """
        self._forget_prompt(digest)
        if self._is_used(digest):
            self._unloaded.add(digest)

    def _forget_prompt(self, digest: str) -> None:
        self.runner.host.drop(digest)
        prefix = self.blocks.prefix(digest)
        if prefix is not None:
            self.scheduler.drop(prefix)

    def _is_used(self, digest: str) -> bool:
        return any(sequence.prompt is not None and sequence.prompt.digest == digest for sequence in self._releases)

    def step(self, before_run: Callable[[], None] = lambda: None) -> None:
        """Advance every scheduled row. An exception fails the prompt or the rows that cause it and no others.

        `before_run` is called when all is ready for the model, which takes the time and not the interpreter's lock.
        """
        step = self.scheduler.schedule()
        self._load(step)
        self._with_memory(lambda: self.runner.cache.copy(step.copies))
        before_run()
        self._run([row for row in step.rows if self._is_live(row)])
        self.num_steps += 1

    # -- the model -------------------------------------------------------------------------------------------------

    def _load(self, step: Step) -> None:
        for prompt, prefix in step.loads:
            try:
                self._with_memory(lambda: self.runner.load(prompt, prefix))  # noqa: B023  # called at once
                self.num_loads += 1
            except Exception as error:
                if is_fatal(error):
                    raise
                self._fail_prefix(prefix, error)

    def _run(self, rows: list[Row]) -> None:
        """Run the rows and take in what they gave. A failing batch is halved until what fails is alone."""
        try:
            output = self._with_memory(lambda: self.runner.run(rows))
        except Exception as error:
            if is_fatal(error):
                raise
            log.exception("a step of %d rows failed", len(rows))
            if len(rows) > 1:
                for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
                    self._run([row for row in half if self._is_live(row)])
            elif isinstance(rows[0].sequence, PromptSequence):
                self._fail_prefix(self._prefix_of(rows[0].sequence), error)
            else:
                self._end(rows[0].sequence, _client_error(error))
        else:
            self._update(rows, output)

    def _is_live(self, row: Row) -> bool:
        sequence = row.sequence
        return sequence in self.scheduler.running or sequence in self.scheduler.loading.values()

    def _with_memory(self, work: Callable[[], T]) -> T:
        """`work` once more, if there is no memory for it, after all that can be spared has been given back.

        That is the tier in host memory, and what torch holds unused on a GPU. The KV cache is taken at start and
        never grows, so evicting from it would free nothing.
        """
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("out of memory; the prompts in host memory are given up, and what is unused on the device")
            self.runner.host.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return work()

    # -- after the model has run -----------------------------------------------------------------------------------

    def _update(self, rows: list[Row], output: StepOutput) -> None:
        for row in rows:
            sequence = row.sequence
            if not self._is_live(row):  # its request has failed meanwhile
                continue
            self.scheduler.computed(row)
            if isinstance(sequence, PromptSequence):
                self._update_prompt(sequence)
            elif isinstance(sequence, GenerationSequence):
                self._update_generation(sequence, row, output)
            elif row in output.scores:
                self._update_score(row, output.scores[row])

    def _update_prompt(self, sequence: PromptSequence) -> None:
        if sequence.num_computed_tokens < sequence.num_tokens:
            return
        prefix = self._prefix_of(sequence)
        try:
            self._with_memory(lambda: self.runner.keep(prefix))
        except Exception as error:
            if is_fatal(error):
                raise
            self._fail_prefix(prefix, error)
        else:
            self.num_loads += 1
            self.scheduler.loaded(prefix)

    def _update_generation(self, sequence: GenerationSequence, row: Row, output: StepOutput) -> None:
        sequence.prompt_logprobs += output.prompt_logprobs.get(row, [])
        found = output.tokens.get(row)
        if isinstance(found, Exception):
            self._end(sequence, found)
        elif found is not None:
            if sequence.params.max_tokens == 0:
                sequence.finish_without_answer()
                self._end(sequence)
                return
            try:
                ended = sequence.append(found.id, found.logprob)
            except Exception as error:  # of its constraint
                self._end(sequence, _client_error(error))
                return
            if ended:
                self._end(sequence)

    def _update_score(self, row: Row, found: list[float] | Exception) -> None:
        sequence = row.sequence
        assert isinstance(sequence, ContextSequence | ContinuationSequence)
        score = sequence.score
        if isinstance(found, Exception):
            self._end(sequence, found)
            return
        if isinstance(sequence, ContextSequence):
            for logprobs, first in zip(score.logprobs, found, strict=True):
                logprobs[0] = first
            self._start_continuations(sequence)
        else:
            end = row.end - sequence.first_scored_position
            score.logprobs[sequence.index][end - len(found) : end] = found
            if row.end == sequence.num_tokens:
                self.scheduler.remove(sequence)
                score.pending -= 1
        if score.pending == 0:
            score.finish(score.logprobs)
            self._end(score.owner)

    def _start_continuations(self, context: ContextSequence) -> None:
        """Turn the context's blocks into a prefix and queue behind it what is longer than one token."""
        score = context.score
        table, context.block_table = context.block_table, []
        num_tokens = context.num_tokens
        self.scheduler.remove(context)
        self.blocks.add(Prefix(score.key, num_tokens, table, ready=True, is_soft_prompt=False))
        for index, tokens in reversed(list(enumerate(score.continuations))):
            if len(tokens) == 1:
                score.pending -= 1
            else:
                text = [*context.token_ids, *tokens]
                sequence = ContinuationSequence(text, score.prompt, context.salt, score=score, index=index)
                self.scheduler.add_next(sequence)

    # -- ends ------------------------------------------------------------------------------------------------------

    def _prefix_of(self, sequence: PromptSequence) -> Prefix:
        return next(prefix for prefix, load in self.scheduler.loading.items() if load is sequence)

    def _fail_prefix(self, prefix: Prefix, error: Exception) -> None:
        log.error("prefix %s could not be loaded: %s", prefix.key, error)
        self.runner.host.drop(prefix.key)
        self.scheduler.drop(prefix)
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            waits = sequence.prefix is None and sequence.prompt is not None and sequence.prompt.digest == prefix.key
            if waits or sequence.prefix is prefix:
                self._end(sequence, _client_error(error))

    def _end(self, sequence: Sequence, error: Exception | None = None) -> None:
        """The one way out: blocks freed, the client told, the pin released, exactly once."""
        if isinstance(error, NumericalError):
            self.blocks.forget(sequence.block_table)
        if isinstance(sequence, ContextSequence | ContinuationSequence):
            sequence = sequence.score.owner
            self._drop_score(sequence.score)
        on_release = self._releases.pop(sequence, None)
        if on_release is None:
            return
        try:
            self.scheduler.remove(sequence)
            digest = sequence.prompt.digest if sequence.prompt else None
            if digest in self._unloaded and not self._is_used(digest):
                self._unloaded.discard(digest)
                self._forget_prompt(digest)
        finally:  # even if the books are broken, which ends the engine: nobody else knows of this request any more
            if error is not None:
                sequence.fail(error)
            on_release()

    def _drop_score(self, score: Score) -> None:
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            if isinstance(sequence, ContinuationSequence) and sequence.score is score:
                self.scheduler.remove(sequence)
        prefix = self.blocks.prefix(score.key)
        if prefix is not None:
            self.blocks.drop(prefix)


def is_fatal(error: Exception) -> bool:
    """After some errors of a device nothing on it works any more in this process."""
    return isinstance(error, torch.AcceleratorError)


def is_out_of_memory(error: Exception) -> bool:
    """On a device, in native code, or as torch's allocator for the CPU says it, which has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _client_error(error: Exception) -> SoftpromptError:
    """What a client may know of an exception."""
    if isinstance(error, SoftpromptError):
        return error
    return EngineFailed(f"the engine could not finish this request: {type(error).__name__}")
