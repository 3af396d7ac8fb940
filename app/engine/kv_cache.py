"""The KV cache's memory."""

from __future__ import annotations

import torch

from app.soft_prompt import BaseInfo

CPU_CACHE_BYTES = 2**30
GPU_CACHE_SHARE = 0.8  # of the memory that the model leaves free


def default_num_tokens(info: BaseInfo, dtype: torch.dtype, device: torch.device, block_size: int) -> int:
    """Positions that fit the default share of memory, at least one whole context."""
    per_token = info.num_layers * 2 * info.num_kv_heads * info.head_dim * dtype.itemsize
    memory = CPU_CACHE_BYTES
    if device.type == "cuda":
        memory = int(torch.cuda.mem_get_info(device)[0] * GPU_CACHE_SHARE)
    return max(memory // per_token, info.max_model_len + 2 * block_size)


class KVCache:
    """Keys and values of all blocks: [num_layers, 2, num_blocks * block_size, num_kv_heads, head_dim]."""

    def __init__(
        self, info: BaseInfo, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = block_size
        shape = (info.num_layers, 2, num_blocks * block_size, info.num_kv_heads, info.head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self._blocks = self.data.view(*shape[:2], num_blocks, block_size, *shape[3:])

    @property
    def block_bytes(self) -> int:
        return self.data.nbytes // self._blocks.shape[2]

    def copy(self, copies: list[tuple[int, int, int]]) -> None:
        """Copy the first positions of blocks: (source, target, how many)."""
        # NOTE: slices, because an index of slots costs several times what the copy does.
        for source, target, count in copies:
            self._blocks[:, :, target, :count] = self._blocks[:, :, source, :count]

    def slots(self, block_table: list[int], start: int, end: int) -> torch.Tensor:
        """Slots of the positions [start, end), int64 on the CPU."""
        positions = torch.arange(start, end)
        blocks = torch.tensor(block_table)[positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size

    def write(self, keys_and_values: torch.Tensor, block_table: list[int]) -> None:
        """Store the first positions of a sequence, [num_layers, 2, positions, num_kv_heads, head_dim]."""
        keys_and_values = keys_and_values.to(self.data.device, self.data.dtype)
        for i, block in enumerate(block_table):
            part = keys_and_values[:, :, i * self.block_size : (i + 1) * self.block_size]
            self._blocks[:, :, block, : part.shape[2]] = part

    def read(self, block_table: list[int], num_tokens: int) -> torch.Tensor:
        """A copy of the first `num_tokens` positions of a sequence, as `write` takes them."""
        return self.data[:, :, self.slots(block_table, 0, num_tokens).to(self.data.device)]
