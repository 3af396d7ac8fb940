"""Accounts for the KV cache in blocks of positions; holds no tensors.

Blocks are reference-counted, so sequences share the full blocks of a prefix and copy only its partial last one.
Block 0 is never given out, so never written: padding points there.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field


@dataclass(eq=False)
class Prefix:
    """Keys and values that several sequences may start from: a soft prompt, or a scoring request's context."""

    key: str
    num_tokens: int
    block_table: list[int]
    users: int = 0  # sequences started from it that still hold blocks
    resident: bool = True


@dataclass
class BlockManager:
    num_blocks: int
    block_size: int
    num_evictions: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._free = deque(range(1, self.num_blocks))
        self._references = [0] * self.num_blocks
        self._prefixes: OrderedDict[str, Prefix] = OrderedDict()  # least recently used first

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
        if count > len(self._free) + self._num_evictable():
            return None
        for prefix in list(self._prefixes.values()):
            if count <= len(self._free):
                break
            if prefix.users == 0:
                self.drop(prefix)
                self.num_evictions += 1
        if count > len(self._free):
            return None
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def _num_evictable(self) -> int:
        """Blocks that dropping every idle prefix would free."""
        idle = [prefix for prefix in self._prefixes.values() if prefix.users == 0]
        # A block may belong to several: a scoring request's context shares those of its soft prompt.
        held = Counter(block for prefix in idle for block in prefix.block_table)
        return sum(self._references[block] == count for block, count in held.items())

    def release(self, blocks: list[int]) -> None:
        """Give up one reference to each block and empty the list."""
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
        blocks.clear()

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

    def drop(self, prefix: Prefix) -> None:
        """Forget a prefix at once; blocks that sequences share stay theirs until they end."""
        if prefix.resident:
            prefix.resident = False
            del self._prefixes[prefix.key]
            self.release(prefix.block_table)

    def fork(self, prefix: Prefix) -> tuple[list[int], list[tuple[int, int]]] | None:
        """A block table that starts with the prefix, and the (source, target) block copies it needs.

        Full blocks are shared; a partial last block is copied because the sequence will write behind the prefix.
        None when there is no block for that copy.
        """
        num_full = prefix.num_tokens // self.block_size
        partial = prefix.block_table[num_full:]
        prefix.users += 1  # also keeps it from being evicted for its own copy
        copy = self.allocate(len(partial))
        if copy is None:
            prefix.users -= 1
            return None
        shared = prefix.block_table[:num_full]
        for block in shared:
            self._references[block] += 1
        return shared + copy, list(zip(partial, copy, strict=True))

    def unfork(self, prefix: Prefix) -> None:
        """A sequence that started from the prefix has released its blocks."""
        prefix.users -= 1
