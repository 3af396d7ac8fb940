"""The model's matrices as the kernel reads them: panels of 16 output columns, all in one block of memory.

storage.h has the layouts. In float32 each matrix is held in the fewest bytes that give back every bit of it. Outputs
are padded with zeros to a multiple of 16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate

import torch
import torch.nn.functional as F

PANEL = 16
_HALF = PANEL // 2
_LINE = 64
_LARGE_PAGE = 2 << 20


class Storage(IntEnum):
    """As in decoder.h."""

    FLOAT32, INT8, BFLOAT16, BLOCKS = range(4)


EXACT = (Storage.BLOCKS, Storage.BFLOAT16, Storage.FLOAT32)  # the smallest first


@dataclass(frozen=True, eq=False)
class Panels:
    """One packed matrix."""

    weights: torch.Tensor  # bytes, a view of the block
    scale: torch.Tensor  # [n] float32; zeros unless it is int8
    bias: torch.Tensor  # [n] float32
    num_inputs: int
    storage: Storage


class Packer:
    """Packs matrices one behind the other, in the order in which a step reads them."""

    def __init__(self, kernel: ctypes.CDLL, shapes: Iterable[tuple[int, int]], *, quantized: bool) -> None:
        """`shapes`: (outputs, inputs) of all that will be packed."""
        self._kernel = kernel
        self._storages = (Storage.INT8,) if quantized else EXACT
        # Room for the largest storage; what is not used is never touched, so it takes no memory.
        num_bytes = sum(self._num_bytes(*shape, self._storages[-1]) for shape in shapes)
        memory = torch.empty(num_bytes + _LARGE_PAGE, dtype=torch.uint8)
        self._memory = memory[-memory.data_ptr() % _LARGE_PAGE :]
        self.used = 0
        # Before it is touched for the first time.
        kernel.softprompt_use_large_pages(self._memory.data_ptr(), self._memory.numel())

    def stack(self, matrices: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> Panels:
        """Matrices [outputs, inputs] of the same input, one below the other."""
        firsts = list(accumulate(map(len, matrices), initial=0))
        panels = self._pack(matrices, firsts.pop(), firsts, _HALF)
        for first, bias in zip(firsts, biases, strict=True):
            if bias is not None:
                panels.bias[first : first + len(bias)] = bias.detach()
        return panels

    def alternate(self, matrices: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> Panels:
        """Two matrices whose outputs meet: 8 of the one and the same 8 of the other in every panel."""
        panels = self._pack(matrices, gated_outputs(len(matrices[0])), [0, _HALF], PANEL)
        for i, bias in enumerate(biases):
            if bias is not None:
                panels.bias.view(-1, 2, _HALF)[:, i] = F.pad(bias.detach(), (0, -len(bias) % _HALF)).view(-1, _HALF)
        return panels

    def _pack(self, matrices: Sequence[torch.Tensor], num_outputs: int, firsts: Sequence[int], step: int) -> Panels:
        columns, num_inputs = padded(num_outputs), matrices[0].shape[1]
        scale, bias = torch.zeros(columns), torch.zeros(columns)
        matrices = [matrix.detach().contiguous() for matrix in matrices]
        for storage in self._storages:
            size = self._num_bytes(num_outputs, num_inputs, storage)
            memory = self._memory[self.used : self.used + size].zero_()
            if all(
                self._kernel.softprompt_pack(
                    matrix.data_ptr(), *matrix.shape, first, step, storage, memory.data_ptr(), scale.data_ptr()
                )
                for matrix, first in zip(matrices, firsts, strict=True)
            ):
                self.used += size
                return Panels(memory, scale, bias, num_inputs, storage)
        raise AssertionError("the last storage takes any weights")

    def _num_bytes(self, num_outputs: int, num_inputs: int, storage: Storage) -> int:
        """Of one matrix; whole cache lines."""
        size: int = padded(num_outputs) // PANEL * self._kernel.softprompt_panel_bytes(storage, num_inputs)
        return -(-size // _LINE) * _LINE


def padded(size: int) -> int:
    return -(-size // PANEL) * PANEL


def gated_outputs(intermediate_size: int) -> int:
    return 2 * (-(-intermediate_size // _HALF) * _HALF)


def pad_vector(vector: torch.Tensor) -> torch.Tensor:
    """A copy, with zeros to a multiple of 16."""
    return F.pad(vector.detach(), (0, padded(len(vector)) - len(vector))).clone()
