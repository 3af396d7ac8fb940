"""Decode steps as CUDA graphs: one launch instead of hundreds, for batches of a few fixed sizes.

A graph replays the same kernels on the same memory, so a step first fills buffers that all graphs share. A batch is
padded to the next size with rows that read one position and write where nobody reads.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import torch

from app.engine.forward import Span
from app.engine.paged_attention import PagedBatch
from app.engine.upload import upload

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_TOKENS, _POSITIONS, _SLOTS, _NUM_KEYS = range(4)  # rows of the header


class CaptureFailed(Exception):
    """A graph could not be captured; nothing that matters was written."""


class GraphBackend(Protocol):
    def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Something that does what `run` does, on the memory it used; it returns the same tensor every time."""
        ...


class CudaGraphs:
    """`torch.cuda.CUDAGraph`; all graphs share one pool, for they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        with torch.cuda.device(self._device):
            # Lazy initialisation (cuBLAS handles, kernels to load) must not fall into the capture.
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads of the server may use CUDA meanwhile: their calls must not spoil the capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = run()

        def replay() -> torch.Tensor:
            with torch.cuda.device(self._device):
                graph.replay()
            return output

        return replay


def upload_ints(ints: Sequence[int], device: torch.device) -> torch.Tensor:
    """int32 on the device by one copy."""
    return upload(torch.frombuffer(array("i", ints), dtype=torch.int32), device)


class DecodeInputs:
    """The buffers every graph reads, for up to `rows` rows of one token each."""

    def __init__(self, rows: int, max_blocks: int, device: torch.device) -> None:
        self._header = torch.zeros(4, rows, dtype=torch.int32, device=device)
        self._tables = torch.zeros(rows, max_blocks, dtype=torch.int32, device=device)
        self._cu_queries = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._cu_keys = torch.zeros(rows + 1, dtype=torch.int32, device=device)

    def fill(self, rows: int, spans: Sequence[Span], block_size: int) -> tuple[list[int], list[list[int]]]:
        """Put the spans into the first `rows` rows, padded; returns every row's number of keys and block table.

        A padding row is token 0 at position 0 of block 0, where all is zero, and so finite. It writes its own key to
        the last slot of block 0, which no row reads: slot 0 stays as it was, for whoever pads with it.
        """
        padding = rows - len(spans)
        positions = [span.start for span in spans]
        lengths = [span.end for span in spans] + [1] * padding
        tables = [span.block_table[: -(-span.end // block_size)] for span in spans] + [[0]] * padding
        width = max(map(len, tables))
        ints = [int(span.inputs[0]) for span in spans] + [0] * padding
        ints += positions + [0] * padding
        for position, table in zip(positions, tables, strict=False):
            ints.append(table[position // block_size] * block_size + position % block_size)
        ints += [block_size - 1] * padding
        ints += lengths
        ints += accumulate(lengths, initial=0)
        for table in tables:
            ints += table
            ints += [0] * (width - len(table))
        staged = upload_ints(ints, self._header.device)
        header, cu_keys, flat_tables = staged.split_with_sizes([4 * rows, rows + 1, rows * width])
        self._header[:, :rows].copy_(header.view(4, rows))
        self._cu_keys[: rows + 1].copy_(cu_keys)
        self._tables[:rows, :width].copy_(flat_tables.view(rows, width))
        return lengths, tables

    def tokens(self, rows: int) -> torch.Tensor:
        return self._header[_TOKENS, :rows]

    def positions(self, rows: int) -> torch.Tensor:
        return self._header[_POSITIONS, :rows]

    def slots(self, rows: int) -> torch.Tensor:
        return self._header[_SLOTS, :rows].long()

    def batch(self, rows: int, lengths: list[int], tables: list[list[int]], block_size: int) -> PagedBatch:
        """What attention reads; the limits are those of the buffers, because a graph outlives this step's lengths."""
        return PagedBatch(
            query_lens=[1] * rows,
            key_lens=lengths,
            tables=tables,
            cu_queries=self._cu_queries[: rows + 1],
            cu_keys=self._cu_keys[: rows + 1],
            num_keys=self._header[_NUM_KEYS, :rows],
            block_tables=self._tables[:rows],
            max_queries=1,
            max_keys=self._tables.shape[1] * block_size,
            static=True,
        )


class GraphRunner:
    """Runs steps in which every row decodes one token; captures a size the first time it comes up.

    `decode(inputs, batch)` is the model: the logits [rows, vocab_size] of the buffers' first rows, and their keys and
    values written. `plan(batch)` is attention's host work before it.
    """

    def __init__(
        self,
        decode: Callable[[DecodeInputs, PagedBatch], torch.Tensor],
        plan: Callable[[PagedBatch], None],
        *,
        backend: GraphBackend,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        assert block_size > 1, "slot 0 of block 0 must stay as it is"
        self._decode, self._plan, self._backend = decode, plan, backend
        self._block_size = block_size
        self._buckets = sorted(buckets)
        self._inputs = DecodeInputs(self._buckets[-1], max_blocks, device)
        self._graphs: dict[int, Callable[[], torch.Tensor]] = {}

    def takes(self, spans: Sequence[Span]) -> bool:
        """Whether every row is one token that wants its logits, and there are not too many."""
        return 0 < len(spans) <= self._buckets[-1] and all(
            span.num_tokens == span.num_logits == 1 and not isinstance(span.inputs, torch.Tensor) for span in spans
        )

    def __call__(self, spans: Sequence[Span]) -> torch.Tensor:
        """float32 logits [spans, vocab_size], the caller's own. Raises CaptureFailed, OutOfMemoryError."""
        rows = next(size for size in self._buckets if size >= len(spans))
        lengths, tables = self._inputs.fill(rows, spans, self._block_size)
        batch = self._inputs.batch(rows, lengths, tables, self._block_size)
        self._plan(batch)
        if rows not in self._graphs:
            try:
                self._graphs[rows] = self._backend.capture(lambda: self._decode(self._inputs, batch))
            except torch.OutOfMemoryError:
                raise  # a want of memory passes: this step fails or is tried again, the next one captures
            except Exception as error:  # a driver or a kernel, each in its own way
                raise CaptureFailed(f"a graph for {rows} rows: {error}") from error
        return self._graphs[rows]()[: len(spans)].to(torch.float32, copy=True)
