"""The engine without threads: sequences in, steps, results out through each sequence's own callbacks.

A step is three calls: schedule, run, update.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

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


class EngineCore:
    """Owned by one thread."""

    def __init__(self, blocks: BlockManager, scheduler: Scheduler, runner: ModelRunner) -> None:
        self.blocks = blocks
        self.scheduler = scheduler
        self.runner = runner
        self.num_steps = 0
        self.num_loads = 0
        self._releases: dict[Sequence, Callable[[], None]] = {}  # requests that have not ended
        scheduler.has_keys_and_values = runner.has_keys_and_values

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
        """Forget a prompt's keys and values; rows that stand on them finish first."""
        self.runner.host.drop(digest)
        prefix = self.blocks.prefix(digest)
        if prefix is not None:
            self.blocks.drop(prefix)

    def step(self, before_run: Callable[[], None] = lambda: None) -> None:
        """Advance every scheduled row. An exception fails the prompt or the rows that cause it and no others.

        `before_run` is called when all is ready for the model, which takes the time and not the interpreter's lock.
        """
        step = self.scheduler.schedule()
        self._load(step)
        self.runner.cache.copy(step.copies)
        before_run()
        rows = [row for row in step.rows if self._is_live(row)]
        try:
            output = self._run(rows)
        except Exception as error:
            if _is_fatal(error):
                raise
            log.exception("a step of %d rows failed; each is tried alone", len(rows))
            for row in rows:
                self._run_alone(row)
        else:
            self._update(rows, output)
        self.num_steps += 1

    # -- the model -------------------------------------------------------------------------------------------------

    def _load(self, step: Step) -> None:
        for prompt, prefix in step.loads:
            try:
                self.runner.load(prompt, prefix)
                self.num_loads += 1
            except Exception as error:
                if _is_fatal(error):
                    raise
                self._fail_prefix(prefix, error)

    def _run(self, rows: list[Row]) -> StepOutput:
        """Out of memory: give up what is not in use, and try once more."""
        try:
            return self.runner.run(rows)
        except torch.OutOfMemoryError:
            log.warning("out of memory in a step of %d rows; %d idle prefixes go", len(rows), self.blocks.drop_idle())
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return self.runner.run(rows)

    def _run_alone(self, row: Row) -> None:
        if not self._is_live(row):  # its request ended with another of its rows
            return
        try:
            output = self.runner.run([row])
        except Exception as error:
            if _is_fatal(error):
                raise
            log.exception("it fails alone, too")
            if isinstance(row.sequence, PromptSequence):
                self._fail_prefix(self._prefix_of(row.sequence), error)
            else:
                self._end(row.sequence, _client_error(error))
        else:
            self._update([row], output)

    def _is_live(self, row: Row) -> bool:
        sequence = row.sequence
        return sequence in self.scheduler.running or sequence in self.scheduler.loading.values()

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
            self.runner.keep(prefix)
        except Exception as error:
            if _is_fatal(error):
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
        self.blocks.add(Prefix(score.key, num_tokens, table, ready=True))
        for index, tokens in reversed(list(enumerate(score.continuations))):
            if len(tokens) == 1:
                score.pending -= 1
            else:
                sequence = ContinuationSequence([*context.token_ids, *tokens], score.prompt, score=score, index=index)
                self.scheduler.add(sequence, first=True)

    # -- ends ------------------------------------------------------------------------------------------------------

    def _prefix_of(self, sequence: PromptSequence) -> Prefix:
        return next(prefix for prefix, load in self.scheduler.loading.items() if load is sequence)

    def _fail_prefix(self, prefix: Prefix, error: Exception) -> None:
        log.error("prefix %s could not be loaded: %s", prefix.key, error)
        self.runner.host.drop(prefix.key)
        for sequence in self.scheduler.drop(prefix):
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
        self.scheduler.remove(sequence)
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


def _is_fatal(error: Exception) -> bool:
    """After some errors of a device nothing on it works any more: the engine has to start anew."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def _client_error(error: Exception) -> SoftpromptError:
    """What a client may know of an exception."""
    if isinstance(error, SoftpromptError):
        return error
    return EngineFailed(f"the engine could not finish this request: {type(error).__name__}")
