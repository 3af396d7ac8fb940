"""The model's matrices as the kernel reads them: panels of 16 output columns, all in one block of memory.

A float matrix becomes [n / 16, k, 16]. An int8 one becomes [n / 16, k / 2, 16, 2], pairs of inputs side by side, with
a scale per output. Outputs are padded with zeros to a multiple of 16, inputs to a multiple of 2.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

PANEL = 16
_HALF = PANEL // 2
_LARGE_PAGE = 2 << 20


@dataclass(frozen=True, eq=False)
class Panels:
    """One packed matrix."""

    weights: torch.Tensor  # bytes, a view of the block
    scale: torch.Tensor  # [n] float32; zeros for a float matrix
    bias: torch.Tensor  # [n] float32
    num_inputs: int


class Packer:
    """Packs matrices one behind the other, in the order in which a step reads them."""

    def __init__(self, kernel: ctypes.CDLL, num_bytes: int, *, quantized: bool) -> None:
        self._kernel = kernel
        self._quantized = quantized
        memory = torch.empty(num_bytes + _LARGE_PAGE, dtype=torch.uint8)
        self._memory = memory[-memory.data_ptr() % _LARGE_PAGE :]
        self._used = 0
        # Before it is touched for the first time.
        kernel.softprompt_use_large_pages(self._memory.data_ptr(), self._memory.numel())
        self._memory.zero_()

    def stack(self, matrices: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> Panels:
        """Matrices [outputs, inputs] of the same input, one below the other."""
        panels = self._panels(sum(map(len, matrices)), matrices[0].shape[1])
        first = 0
        for matrix, bias in zip(matrices, biases, strict=True):
            self._fill(panels, matrix, first, _HALF)
            if bias is not None:
                panels.bias[first : first + len(bias)] = bias.detach()
            first += len(matrix)
        return panels

    def alternate(self, matrices: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> Panels:
        """Two matrices whose outputs meet: 8 of the one and the same 8 of the other in every panel."""
        panels = self._panels(gated_outputs(len(matrices[0])), matrices[0].shape[1])
        for i, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
            self._fill(panels, matrix, i * _HALF, PANEL)
            if bias is not None:
                panels.bias.view(-1, 2, _HALF)[:, i] = F.pad(bias.detach(), (0, -len(bias) % _HALF)).view(-1, _HALF)
        return panels

    def _panels(self, num_outputs: int, num_inputs: int) -> Panels:
        size, first = packed_bytes(num_outputs, num_inputs, quantized=self._quantized), self._used
        self._used += size
        columns = padded(num_outputs)
        return Panels(self._memory[first : first + size], torch.zeros(columns), torch.zeros(columns), num_inputs)

    def _fill(self, panels: Panels, matrix: torch.Tensor, first: int, step: int) -> None:
        matrix = matrix.detach().contiguous()
        self._kernel.softprompt_pack(
            matrix.data_ptr(),
            *matrix.shape,
            first,
            step,
            self._quantized,
            panels.weights.data_ptr(),
            panels.scale.data_ptr(),
        )


def padded(size: int) -> int:
    return -(-size // PANEL) * PANEL


def gated_outputs(intermediate_size: int) -> int:
    return 2 * (-(-intermediate_size // _HALF) * _HALF)


def packed_bytes(num_outputs: int, num_inputs: int, *, quantized: bool) -> int:
    """Of one matrix; a multiple of 32, so that all are aligned to vectors."""
    return padded(num_outputs) * (num_inputs + num_inputs % 2 if quantized else 4 * num_inputs)


def pad_vector(vector: torch.Tensor) -> torch.Tensor:
    """A copy, with zeros to a multiple of 16."""
    return F.pad(vector.detach(), (0, padded(len(vector)) - len(vector))).clone()
