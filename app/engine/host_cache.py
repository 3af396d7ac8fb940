"""Keys and values of soft prompts in host memory: the tier behind the KV cache, so that coming back costs a copy."""

from __future__ import annotations

from collections import OrderedDict

import torch


class HostCache:
    """The computed prefixes used last, up to `max_bytes`, by content digest. Owned by the engine thread.

    An entry is [num_layers, 2, num_virtual_tokens, num_kv_heads, head_dim] in the cache's dtype.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, torch.Tensor] = OrderedDict()  # least recently used first
        self.num_bytes = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, digest: str) -> torch.Tensor | None:
        if digest in self._entries:
            self._entries.move_to_end(digest)
        return self._entries.get(digest)

    def put(self, digest: str, keys_and_values: torch.Tensor) -> None:
        """Keep them, dropping the entries that were not used for longest; not at all if they are larger than all."""
        self.drop(digest)
        if keys_and_values.nbytes > self._max_bytes:
            return
        self._entries[digest] = keys_and_values
        self.num_bytes += keys_and_values.nbytes
        while self.num_bytes > self._max_bytes:
            self.drop(next(iter(self._entries)))

    def clear(self) -> None:
        self._entries.clear()
        self.num_bytes = 0

    def drop(self, digest: str) -> None:
        entry = self._entries.pop(digest, None)
        if entry is not None:
            self.num_bytes -= entry.nbytes
