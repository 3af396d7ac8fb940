"""Decides which sequences the model sees next, and with how many tokens each; holds no tensors."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from app.engine.block_manager import BlockManager, Prefix
from app.engine.sequence import GenerationSequence, PromptSequence, Sequence
from app.engine.waiting import WaitingQueue

if TYPE_CHECKING:
    from app.soft_prompt import SoftPrompt


MAX_LOADED_TOKENS = 2048  # copied in a step, or one prompt; more would be felt by those who stream


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

    loads: list[tuple[SoftPrompt, Prefix]] = field(default_factory=list)  # keys and values to be copied in
    copies: list[tuple[int, int, int]] = field(default_factory=list)  # (source, target, positions) of blocks
    rows: list[Row] = field(default_factory=list)

    @property
    def num_loaded_tokens(self) -> int:
        return sum(prefix.num_tokens for _, prefix in self.loads)


@dataclass
class Scheduler:
    """Running sequences go first, so a stream never waits for an admission; waiting tasks take turns.

    A soft prompt that has to be computed is a row like any other, in chunks under the same budget. Its requests wait
    in their lane until it is there; the others go on.
    """

    blocks: BlockManager
    max_num_seqs: int
    max_num_batched_tokens: int  # above max_num_seqs, so that every running row gets its token and loads go on
    # Whether a prompt's keys and values can be had by copying, without the model.
    has_keys_and_values: Callable[[SoftPrompt], bool] = lambda prompt: prompt.kind == "kv"
    num_preemptions: int = field(default=0, init=False)
    num_queried_tokens: int = field(default=0, init=False)  # of text that was looked for in the cache, once a request
    num_cached_tokens: int = field(default=0, init=False)  # of those, found there

    def __post_init__(self) -> None:
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.loading: dict[Prefix, PromptSequence] = {}
        self._computing: dict[bytes, Sequence] = {}  # names of blocks of text that a running sequence will fill

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.loading)

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    def add_next(self, sequence: Sequence) -> None:
        """Before what else waits for the same prompt."""
        self.waiting.add_next(sequence)

    def schedule(self) -> Step:
        """Choose rows under the token budget. Every row's blocks are there when this returns."""
        step = Step()
        prefilling = [sequence for sequence in self.running if sequence.num_uncomputed_tokens > 1]
        for sequence in [sequence for sequence in self.running if sequence.num_uncomputed_tokens == 1]:
            # Streams may need a block each, and may preempt for it; the others hold all the blocks of their texts.
            if sequence in self.running and self._grow(sequence):
                self._add_row(step, sequence, 1)
        prefilling = [sequence for sequence in prefilling if sequence in self.running]
        # What streams leave is shared: loads take up to half, those who wait up to half of the rest, so that neither
        # a long text nor a long soft prompt keeps others from starting; what one does not need goes to the next.
        budget = self.max_num_batched_tokens - len(step.rows)
        spare = max(0, budget - len(prefilling))
        for_loads = min((spare + 1) // 2, sum(load.num_uncomputed_tokens for load in self.loading.values()))
        for_waiting = (spare - for_loads + 1) // 2
        budget -= for_loads + for_waiting - self._admit(step, for_waiting)
        for turn, sequence in enumerate(prefilling, start=1):
            budget -= self._add_row(step, sequence, budget - (len(prefilling) - turn))
        budget = self._admit(step, budget) + for_loads
        for load in self.loading.values():
            if budget > 0:
                budget -= self._add_row(step, load, budget)
        if not self.running and not self.loading and self.waiting:
            self._make_room_for(self.waiting.heads()[0])
        return step

    def remove(self, sequence: Sequence) -> bool:
        """Take a sequence out, wherever it is, and free its blocks; False if it was not here."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif not self.waiting.remove(sequence):
            return False
        self._release(sequence)
        return True

    def loaded(self, prefix: Prefix) -> None:
        """The prefix's keys and values are in place: its requests may start."""
        prefix.ready = True
        self._end_load(prefix)

    def drop(self, prefix: Prefix) -> None:
        """Give a prefix up, while it is being computed too; whoever runs on it has it to the end."""
        self._end_load(prefix)
        self.blocks.drop(prefix)

    def computed(self, row: Row) -> None:
        """A row has run: what it filled of the text can be found by others from now on."""
        sequence, size = row.sequence, self.blocks.block_size
        sequence.num_computed_tokens = row.end
        first = max(row.start // size, sequence.num_virtual_tokens // size)
        end = min(row.end, sequence.num_shared_tokens) // size
        if first < end:
            for index, name in enumerate(sequence.block_names(first, end, size), start=first):
                self.blocks.name(sequence.block_table[index], name)
                if self._computing.get(name) is sequence:
                    del self._computing[name]

    # -- admission -------------------------------------------------------------------------------------------------

    def _admit(self, step: Step, budget: int) -> int:
        """Start waiting sequences while there is budget and memory; what is left of the budget."""
        admitted = True
        while admitted and self.waiting:
            admitted = False
            for sequence in self.waiting.heads():
                if budget <= 0 or len(self.running) >= self.max_num_seqs:
                    return budget
                context = self.blocks.prefix(sequence.context_key)
                if context is None and self._is_being_computed(sequence):
                    continue  # a twin is at it; in a moment its blocks can be shared
                prefix = context
                if prefix is None and sequence.prompt is not None:
                    if self._is_busy_loading(sequence.prompt):
                        continue
                    prefix = self._find_or_load(step, sequence.prompt)
                    if prefix is None:
                        return budget  # nobody overtakes it to the blocks that are freed next
                    if not prefix.ready:
                        continue
                if not self._start(step, sequence, prefix, [] if context else self._names(sequence)):
                    return budget
                admitted = True
                self.waiting.admit(sequence)
                self.running.append(sequence)
                budget -= self._add_row(step, sequence, budget)
        return budget

    def _make_room_for(self, sequence: Sequence) -> None:
        """Nothing runs and it does not fit: it gives up the context it scores against, and will compute it itself."""
        context = self.blocks.prefix(sequence.context_key)
        if context is not None:
            self.blocks.drop(context)

    def _start(self, step: Step, sequence: Sequence, prefix: Prefix | None, names: list[bytes]) -> bool:
        """Give a waiting sequence its prefix and blocks for all its tokens, or change nothing it can see."""
        fork = self.blocks.fork(prefix, names, sequence.num_tokens)
        if fork is None:
            return False
        step.copies += fork.copies
        sequence.prefix = prefix
        sequence.block_table = fork.block_table
        sequence.num_computed_tokens = fork.num_tokens
        if sequence.queue_seconds is None:
            self._count_first_start(sequence, prefix)
        num_found = fork.num_tokens // self.blocks.block_size - sequence.num_virtual_tokens // self.blocks.block_size
        for name in names[num_found:]:
            self._computing.setdefault(name, sequence)
        return True

    def _count_first_start(self, sequence: Sequence, prefix: Prefix | None) -> None:
        sequence.queue_seconds = time.monotonic() - sequence.created_at
        num_cached = sequence.num_computed_tokens - sequence.num_virtual_tokens
        if isinstance(sequence, GenerationSequence):
            sequence.num_cached_tokens = num_cached
        if sequence.reads_cached_text and (prefix is None or prefix.is_soft_prompt):
            self.num_queried_tokens += sequence.num_tokens - sequence.num_virtual_tokens
            self.num_cached_tokens += num_cached

    def _is_busy_loading(self, prompt: SoftPrompt) -> bool:
        """Whether the prompt would have to be computed behind a step's worth of others: it takes no blocks yet.

        They could be neither evicted nor preempted, and nothing would come of them any sooner.
        """
        outstanding = sum(load.num_uncomputed_tokens for load in self.loading.values())
        if outstanding < self.max_num_batched_tokens or self.has_keys_and_values(prompt):
            return False
        return self.blocks.prefix(prompt.digest) is None

    def _find_or_load(self, step: Step, prompt: SoftPrompt) -> Prefix | None:
        """The prompt's prefix; if it is not resident, with blocks and on its way. None: no blocks, or not now."""
        prefix = self.blocks.prefix(prompt.digest)
        if prefix is None:
            by_copy = self.has_keys_and_values(prompt)
            if by_copy and step.loads and step.num_loaded_tokens + prompt.num_virtual_tokens > MAX_LOADED_TOKENS:
                return None
            table = self.blocks.allocate(self.blocks.num_blocks_for(prompt.num_virtual_tokens))
            if table is None:
                return None
            prefix = Prefix(prompt.digest, prompt.num_virtual_tokens, table, ready=by_copy)
            self.blocks.add(prefix)
            if by_copy:
                step.loads.append((prompt, prefix))
            else:
                prefix.users += 1
                self.loading[prefix] = PromptSequence([], prompt, block_table=table)
        return prefix

    def _names(self, sequence: Sequence) -> list[bytes]:
        """Of the full blocks of its text that it could share, up to the first position it needs logits of."""
        if not sequence.reads_cached_text:
            return []
        size = self.blocks.block_size
        return sequence.block_names(sequence.num_virtual_tokens // size, sequence.first_needed_position // size, size)

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Whether the next block that it would have to compute is on its way in another sequence."""
        if not self._computing:
            return False
        unknown = next((name for name in self._names(sequence) if not self.blocks.knows(name)), None)
        return unknown is not None and self._computing.get(unknown, sequence) is not sequence

    # -- running ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _add_row(step: Step, sequence: Sequence, budget: int) -> int:
        """As many tokens as there are and the budget allows; how many that is."""
        start = sequence.num_computed_tokens
        count = min(sequence.num_uncomputed_tokens, budget)
        step.rows.append(Row(sequence, start, start + count))
        return count

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for all its tokens, giving up the newest loads, then preempting the newest sequences.

        False if `sequence` itself was preempted.
        """
        missing = self.blocks.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)
        while missing > 0:
            blocks = self.blocks.allocate(missing)
            if blocks is not None:
                sequence.block_table += blocks
                break
            if self.loading:
                self.drop(next(reversed(self.loading)))  # its requests wait on, and start it again
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; what it had computed is computed again later, bit for bit the same input."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.resume(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        for name in sequence.names:
            if self._computing.get(name) is sequence:
                del self._computing[name]
        self.blocks.release(sequence.block_table)
        sequence.num_computed_tokens = 0
        if sequence.prefix is not None:
            self.blocks.unfork(sequence.prefix)
            sequence.prefix = None

    def _end_load(self, prefix: Prefix) -> None:
        if self.loading.pop(prefix, None) is not None:
            self.blocks.unfork(prefix)
