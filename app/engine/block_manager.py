"""Accounts for the KV cache in blocks of positions; holds no tensors.

Blocks are reference-counted, so sequences share the full blocks of a prefix and copy only its partial last one. A
full block of text also has a name, the hash of everything up to its end; it can be found by it and shared until its
memory is needed for something else. Block 0 is never given out, so never written: padding points there.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Prefix:
    """Keys and values that several sequences may start from: a soft prompt, or a scoring request's context."""

    key: str
    num_tokens: int
    block_table: list[int]
    users: int = 0  # sequences started from it that still hold blocks, and the one that fills it
    resident: bool = True
    ready: bool = False  # its keys and values are in place
    is_soft_prompt: bool = True


@dataclass
class BlockManager:
    num_blocks: int
    block_size: int
    num_evictions: int = field(default=0, init=False)  # of soft prompts
    num_soft_prompt_blocks: int = field(default=0, init=False)  # held by them

    def __post_init__(self) -> None:
        # Least recently used first. A named block stays findable here until it is given out again.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, self.num_blocks))
        self._references = [0] * self.num_blocks
        self._prefixes: OrderedDict[str, Prefix] = OrderedDict()  # least recently used first
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    @property
    def num_usable_blocks(self) -> int:
        return self.num_blocks - 1

    @property
    def num_used_blocks(self) -> int:
        return self.num_usable_blocks - len(self._free)

    @property
    def num_prefixes(self) -> int:
        return len(self._prefixes)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def fits_alone(self, num_virtual_tokens: int, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` positions could run on an otherwise empty cache."""
        shared = num_virtual_tokens // self.block_size
        prefix = self.num_blocks_for(num_virtual_tokens)
        return prefix + self.num_blocks_for(num_tokens) - shared <= self.num_usable_blocks

    # -- blocks --------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks, or None; evicts idle prefixes for them, least recently used first."""
        victims = self._victims(count - len(self._free))
        if victims is None:
            return None
        for prefix in victims:
            self.drop(prefix)
            self.num_evictions += prefix.is_soft_prompt
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
            self._forget(block)
        return blocks

    def _victims(self, missing: int) -> list[Prefix] | None:
        """Idle prefixes, least recently used first, whose dropping frees `missing` blocks; None if all would not do."""
        victims: list[Prefix] = []
        held: Counter[int] = Counter()
        for prefix in self._prefixes.values():
            if missing <= 0:
                break
            if prefix.users == 0:
                victims.append(prefix)
                for block in prefix.block_table:
                    # A block may belong to several: a scoring request's context shares those of its soft prompt.
                    held[block] += 1
                    missing -= self._references[block] == held[block]
        return victims if missing <= 0 else None

    def release(self, blocks: list[int]) -> None:
        """Give up one reference to each block and empty the list."""
        # From the end: of a text, the blocks that most other texts begin with are given out last.
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._names:
                    self._free.move_to_end(block, last=False)
        blocks.clear()

    # -- blocks of text, by name -----------------------------------------------------------------------------------

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known start of a chain of names, now held by the caller."""
        blocks = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            self._free.pop(block, None)
            self._references[block] += 1
            blocks.append(block)
        return blocks

    def knows(self, name: bytes) -> bool:
        return name in self._named

    def name(self, block: int, name: bytes) -> None:
        """Make a held block findable. Its positions are all computed and will not be written again."""
        if name not in self._named:
            self._forget(block)
            self._named[name] = block
            self._names[block] = name

    def forget(self, blocks: Iterable[int]) -> None:
        """Take the names of blocks that may hold something broken."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        name = self._names.pop(block, None)
        if name is not None:
            del self._named[name]

    # -- prefixes ------------------------------------------------------------------------------------------------

    def prefix(self, key: str | None) -> Prefix | None:
        """The resident prefix of that name, now the most recently used."""
        if key is None or key not in self._prefixes:
            return None
        self._prefixes.move_to_end(key)
        return self._prefixes[key]

    def add(self, prefix: Prefix) -> None:
        """Make a prefix findable; the manager takes over its references."""
        assert prefix.key not in self._prefixes, prefix.key
        self._prefixes[prefix.key] = prefix
        self.num_soft_prompt_blocks += len(prefix.block_table) * prefix.is_soft_prompt

    def drop(self, prefix: Prefix) -> None:
        """Let nobody find the prefix any more; its blocks are free when its last user is done with it."""
        if prefix.resident:
            prefix.resident = False
            del self._prefixes[prefix.key]
            self._release_unused(prefix)

    def _release_unused(self, prefix: Prefix) -> None:
        if prefix.users == 0 and not prefix.resident:
            self.num_soft_prompt_blocks -= len(prefix.block_table) * prefix.is_soft_prompt
            self.release(prefix.block_table)

    def fork(self, prefix: Prefix | None, names: Sequence[bytes], num_tokens: int) -> Fork | None:
        """A block table for `num_tokens` positions that starts with the prefix and with what is known of the text.

        `names` are those of the blocks behind the prefix's full ones. Those are shared; the prefix's partial last
        block is copied, unless a known block has its positions already, because the sequence will write behind them.
        None when there are not enough blocks.
        """
        num_full = prefix.num_tokens // self.block_size if prefix else 0
        shared = list(prefix.block_table[:num_full]) if prefix else []
        partial = prefix.block_table[num_full:] if prefix else []
        for block in shared:
            self._references[block] += 1
        if prefix is not None:
            prefix.users += 1  # also keeps it from being evicted for its own copy
        table = shared + self.find(names)
        num_found = len(table) - num_full
        own = self.allocate(max(0, self.num_blocks_for(num_tokens) - len(table)))
        if own is None:
            self.release(table)
            if prefix is not None:
                self.unfork(prefix)
            return None
        count = prefix.num_tokens % self.block_size if prefix else 0
        copies = (
            [(source, target, count) for source, target in zip(partial, own, strict=False)] if not num_found else []
        )
        start = prefix.num_tokens if prefix else 0
        return Fork(table + own, copies, max(start, len(table) * self.block_size))

    def unfork(self, prefix: Prefix) -> None:
        """A sequence that started from the prefix has released its blocks."""
        prefix.users -= 1
        self._release_unused(prefix)


@dataclass(frozen=True)
class Fork:
    block_table: list[int]
    copies: list[tuple[int, int, int]]  # the first positions of blocks: (source, target, how many)
    num_tokens: int  # positions that need not be computed
