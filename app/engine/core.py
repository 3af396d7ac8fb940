"""The engine without threads: sequences in, steps, results out through each sequence's own callbacks.

A step is three calls: schedule, run, update.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from app.engine.block_manager import BlockManager, Prefix
from app.engine.model_runner import ModelRunner, StepOutput
from app.engine.scheduler import Row, Scheduler, Step
from app.engine.sequence import (
    ContextSequence,
    ContinuationSequence,
    GenerationSequence,
    Score,
    Sequence,
)
from app.errors import EngineFailed, NumericalError, Overloaded, SoftpromptError
from app.soft_prompt import SoftPrompt

log = logging.getLogger(__name__)

NOT_FINITE = "the model gave logits that are not finite for this request"


class EngineCore:
    """Owned by one thread."""

    def __init__(self, blocks: BlockManager, scheduler: Scheduler, runner: ModelRunner) -> None:
        self.blocks = blocks
        self.scheduler = scheduler
        self.runner = runner
        self.num_steps = 0
        self.num_loads = 0
        self._releases: dict[Sequence, Callable[[], None]] = {}  # requests that have not ended

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

    def step(self) -> None:
        """Advance every scheduled row. An exception of the model fails the rows of this step and no others."""
        step = self.scheduler.schedule()
        try:
            output = self.runner.run(step)
        except Exception as error:
            log.exception("a step of %d rows failed", len(step.rows))
            for row in step.rows:
                self._end(row.sequence, _client_error(error))
            for _, prefix in step.loads:
                self.blocks.drop(prefix)
            return
        self._update(step, output)
        self.num_steps += 1

    def load(self, prompt: SoftPrompt) -> None:
        """Make a soft prompt resident and try one token behind it. Raises NumericalError, Overloaded, EngineFailed."""
        step = Step()
        prefix = self.scheduler.find_or_allocate(step, prompt)
        if prefix is None:
            raise Overloaded("no room in the KV cache to try the soft prompt")
        output = self.runner.run(step)
        self._update(step, output)
        if prefix in output.failed_prefixes:
            raise _client_error(output.failed_prefixes[prefix])
        prefix.users += 1  # keeps it while it is tried
        scratch = self.blocks.allocate(1)
        prefix.users -= 1
        if scratch is None:
            raise Overloaded("no room in the KV cache to try the soft prompt")
        try:
            if not self.runner.probe(prefix, scratch[0]):
                raise NumericalError("the model's logits behind this soft prompt are not finite")
        except Exception as error:
            self.blocks.drop(prefix)
            raise _client_error(error) from error
        finally:
            self.blocks.release(scratch)

    def unload(self, digest: str) -> None:
        """Forget a prefix; the blocks that rows share with it are freed with the last of them."""
        prefix = self.blocks.prefix(digest)
        if prefix is not None:
            self.blocks.drop(prefix)

    # -- after the model has run -----------------------------------------------------------------------------------

    def _update(self, step: Step, output: StepOutput) -> None:
        for prefix, error in output.failed_prefixes.items():
            log.error("prefix %s could not be loaded: %s", prefix.key, error)
            for row in step.rows:
                if row.sequence.prefix is prefix:
                    self._end(row.sequence, _client_error(error))
            self.blocks.drop(prefix)
        self.num_loads += len(step.loads) - len(output.failed_prefixes)
        for row in step.rows:
            if row.sequence in self.scheduler.running:
                row.sequence.num_computed_tokens = row.end
        for row, token in output.tokens.items():
            assert isinstance(row.sequence, GenerationSequence)
            if token is None:
                self._end(row.sequence, NumericalError(NOT_FINITE))
            elif row.sequence.append(token):
                self._end(row.sequence)
        for row, logprobs in output.logprobs.items():
            if row.sequence in self.scheduler.running:  # else its request has failed meanwhile
                self._update_score(row, logprobs)

    def _update_score(self, row: Row, logprobs: list[float] | None) -> None:
        sequence = row.sequence
        assert isinstance(sequence, ContextSequence | ContinuationSequence)
        score = sequence.score
        if logprobs is None:
            self._end(sequence, NumericalError(NOT_FINITE))
            return
        if isinstance(sequence, ContextSequence):
            for found, first in zip(score.logprobs, logprobs, strict=True):
                found[0] = first
            self._start_continuations(sequence)
        else:
            end = row.end - sequence.first_scored_position
            score.logprobs[sequence.index][end - len(logprobs) : end] = logprobs
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
        self.scheduler.remove(context)
        self.blocks.add(Prefix(score.key, context.num_tokens, table))
        for index, tokens in reversed(list(enumerate(score.continuations))):
            if len(tokens) == 1:
                score.pending -= 1
            else:
                sequence = ContinuationSequence([*context.token_ids, *tokens], score.prompt, score=score, index=index)
                self.scheduler.add(sequence, first=True)

    def _end(self, sequence: Sequence, error: Exception | None = None) -> None:
        """The one way out: blocks freed, the client told, the pin released, exactly once."""
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


def _client_error(error: Exception) -> SoftpromptError:
    """What a client may know of an exception."""
    if isinstance(error, SoftpromptError):
        return error
    return EngineFailed(f"the engine could not finish this request: {type(error).__name__}")
