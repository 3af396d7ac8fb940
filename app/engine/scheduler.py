"""Decides which sequences the model sees next, and with how many tokens each; holds no tensors."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from app.engine.block_manager import BlockManager, Prefix
from app.engine.sequence import Sequence

if TYPE_CHECKING:
    from app.soft_prompt import SoftPrompt


@dataclass(frozen=True, eq=False)
class Row:
    """Positions [start, end) of one sequence."""

    sequence: Sequence
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def num_logits(self) -> int:
        return self.sequence.num_logits(self.start, self.end)


@dataclass(eq=False)
class Step:
    """What the model runner does, in this order."""

    loads: list[tuple[SoftPrompt, Prefix]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (source, target) blocks
    rows: list[Row] = field(default_factory=list)


@dataclass
class Scheduler:
    """First come, first served. Running sequences go first, so a stream never waits for an admission."""

    blocks: BlockManager
    max_num_seqs: int
    max_num_batched_tokens: int  # at least max_num_seqs, so that every running row gets its token
    num_preemptions: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence, *, first: bool = False) -> None:
        if first:
            self.waiting.appendleft(sequence)
        else:
            self.waiting.append(sequence)

    def schedule(self) -> Step:
        """Choose rows under the token budget. Every row's blocks are there when this returns."""
        step = Step()
        budget = self.max_num_batched_tokens
        turns = list(self.running)
        for turn, sequence in enumerate(turns, start=1):
            if sequence not in self.running:  # preempted for an earlier one
                continue
            # A long prompt takes what the rows after it leave: one token each.
            count = min(sequence.num_tokens - sequence.num_computed_tokens, budget - (len(turns) - turn))
            if self._grow(sequence, sequence.num_computed_tokens + count):
                budget -= count
                self._add_row(step, sequence, count)
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if not self._admit(step, sequence):
                context = self.blocks.prefix(sequence.context_key)
                if context is None or self.running:
                    break
                # Nothing will free blocks but the context itself: give it up and compute from the soft prompt on.
                self.blocks.drop(context)
                continue
            self.waiting.popleft()
            self.running.append(sequence)
            count = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            budget -= count
            self._add_row(step, sequence, count)
        return step

    def remove(self, sequence: Sequence) -> bool:
        """Take a sequence out, wherever it is, and free its blocks; False if it was not here."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            return False
        self._release(sequence)
        return True

    def find_or_allocate(self, step: Step, prompt: SoftPrompt) -> Prefix | None:
        """The prompt's prefix; if it is not resident, with blocks and a load in `step`. None: no blocks."""
        prefix = self.blocks.prefix(prompt.digest)
        if prefix is None:
            table = self.blocks.allocate(self.blocks.num_blocks_for(prompt.num_virtual_tokens))
            if table is None:
                return None
            prefix = Prefix(prompt.digest, prompt.num_virtual_tokens, table)
            self.blocks.add(prefix)
            step.loads.append((prompt, prefix))
        return prefix

    @staticmethod
    def _add_row(step: Step, sequence: Sequence, count: int) -> None:
        step.rows.append(Row(sequence, sequence.num_computed_tokens, sequence.num_computed_tokens + count))

    def _admit(self, step: Step, sequence: Sequence) -> bool:
        """Give a waiting sequence its prefix and blocks for all its tokens, or change nothing it can see."""
        prefix = self.blocks.prefix(sequence.context_key)
        if prefix is None and sequence.prompt is not None:
            prefix = self.find_or_allocate(step, sequence.prompt)
            if prefix is None:
                return False
        if prefix is not None:
            forked = self.blocks.fork(prefix)
            if forked is None:
                return False
            sequence.prefix = prefix
            sequence.block_table, copies = forked
            sequence.num_computed_tokens = prefix.num_tokens
        missing = self.blocks.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)
        blocks = self.blocks.allocate(max(missing, 0))
        if blocks is None:
            self._release(sequence)
            return False
        if prefix is not None:
            step.copies += copies
        sequence.block_table += blocks
        return True

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for `num_tokens` positions, preempting the newest sequences; False if that was `sequence`."""
        missing = self.blocks.num_blocks_for(num_tokens) - len(sequence.block_table)
        while missing > 0:
            blocks = self.blocks.allocate(missing)
            if blocks is not None:
                sequence.block_table += blocks
                break
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; what it had computed is computed again later, bit for bit the same input."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.num_computed_tokens = 0
        if sequence.prefix is not None:
            self.blocks.unfork(sequence.prefix)
            sequence.prefix = None
