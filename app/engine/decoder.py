"""The Llama family in few, large operations: every token of a step in one batch, without padding.

Queries, keys and values are one product, as are the MLP's two inputs; the residual is added inside the products that
feed it. Where the model's own code rounds to its dtype in between (norms, rotary positions, residuals), this one
rounds once, so in bfloat16 it is a little nearer to float32.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch.nn import functional

from app.engine.attention_kernels import Kind, choose_attention
from app.engine.cuda_graphs import CaptureFailed, CudaGraphs, DecodeInputs, GraphBackend, GraphRunner, upload_ints
from app.engine.forward import Span
from app.engine.kv_cache import KVCache
from app.engine.paged_attention import Geometry, PagedBatch
from app.engine.weights import DecoderWeights, LayerWeights

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _FusedLayer:
    qkv: torch.Tensor  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]
    qkv_bias: torch.Tensor | None
    gate_up: torch.Tensor  # [2 * intermediate_size, hidden_size]
    gate_up_bias: torch.Tensor | None
    own: LayerWeights  # the rest


class FusedDecoder:
    """Implements `app.engine.forward.Forward` on any device and float dtype.

    Construction moves the matrices it fuses into common memory and lets the model's own parameters be views of it:
    the model works as before, with the same values, and nothing is held twice. After that the model must not be moved.

    `graphs=None` captures decode steps where that pays: on CUDA, with an attention kernel. A capture that fails ends
    them for good, and `describe` says why. Raises
    attention_check.Unavailable if `attention` names an implementation that is not to be had here, ValueError for
    `graphs=True` without CUDA.
    """

    def __init__(
        self,
        model: Any,
        weights: DecoderWeights,
        cache: KVCache,
        *,
        attention: Kind = "auto",
        graphs: bool | None = None,
        graph_backend: GraphBackend | None = None,
    ) -> None:
        self._weights = weights
        self._data = cache.data
        self._block_size = cache.block_size
        self._max_positions = len(weights.cos)
        # The two halves of a head turn by the same angles, in opposite directions.
        self._cos = torch.cat((weights.cos, weights.cos), dim=-1)
        self._sin = torch.cat((-weights.sin, weights.sin), dim=-1)
        self._layers = fuse(weights)
        num_layers, _, _, num_kv_heads, head_dim = self._data.shape
        # [layers, 2, blocks, block_size, kv heads, head_dim], as attention reads it
        self._blocks = self._data.view(num_layers, 2, -1, cache.block_size, num_kv_heads, head_dim)
        max_blocks = -(-self._max_positions // cache.block_size)
        geometry = Geometry(
            num_heads=weights.num_heads,
            num_kv_heads=weights.num_kv_heads,
            head_dim=weights.head_dim,
            block_size=cache.block_size,
            max_blocks=max_blocks,
            scale=weights.attention_scale,
            windows=tuple(sorted({layer.window for layer in weights.layers})),
            dtype=self._data.dtype,
            device=self._data.device,
        )
        self._attention, self.not_used = choose_attention(attention, geometry)
        on_cuda = self._data.device.type == "cuda"
        if graphs and not on_cuda and graph_backend is None:
            raise ValueError("CUDA graphs need a CUDA device")
        if graphs is None:
            graphs = on_cuda and self._attention.graphs
        self._graphs = None
        if graphs:
            self._graphs = GraphRunner(
                self._decode,
                self._attention.plan,
                backend=graph_backend or CudaGraphs(self._data.device),
                max_blocks=max_blocks,
                block_size=cache.block_size,
                device=self._data.device,
            )
        self._name = type(model).__name__
        self._without = [str(reason) for reason in self.not_used] if on_cuda else []

    @property
    def describe(self) -> str:
        """See `Forward`."""
        text = (
            f"fused {self._name} in {str(self._data.dtype).removeprefix('torch.')} on {self._data.device}, "
            f"attention {self._attention.name}, CUDA graphs {'off' if self._graphs is None else 'on'}"
        )
        return f"{text} (not used: {'; '.join(self._without)})" if self._without else text

    @torch.inference_mode()
    def __call__(self, spans: Sequence[Span]) -> torch.Tensor:
        """See `Forward`. Raises ValueError for positions the model does not have."""
        if any(span.end > self._max_positions for span in spans):
            raise ValueError(f"positions beyond {self._max_positions}")
        if self._graphs is not None and self._graphs.takes(spans):
            try:
                return self._graphs(spans)
            except CaptureFailed as error:
                log.warning("no CUDA graphs, so decoding is slower: %s", error, exc_info=True)
                self._graphs = None
                self._without.append(str(error))
        if not spans:
            return self._weights.embedding.new_empty(0, len(self._weights.lm_head), dtype=torch.float32)
        return self._eager(spans).float()

    def _eager(self, spans: Sequence[Span]) -> torch.Tensor:
        """Any spans. The lists that describe them travel as one: first those of tokens, then those of rows."""
        size, total = self._block_size, sum(span.num_tokens for span in spans)
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []  # tokens whose logits are
        starts = [0]  # of the spans, in tokens
        embedded: list[tuple[int, torch.Tensor]] = []
        for span in spans:
            if isinstance(span.inputs, torch.Tensor):
                embedded.append((starts[-1], span.inputs))
                tokens += [0] * span.num_tokens
            else:
                tokens += span.inputs
            positions += range(span.start, span.end)
            slots += [span.block_table[p // size] * size + p % size for p in range(span.start, span.end)]
            starts.append(starts[-1] + span.num_tokens)
            wanted += range(starts[-1] - span.num_logits, starts[-1])
        lengths = [span.end for span in spans]
        tables = [span.block_table[: -(-span.end // size)] for span in spans]
        ends = accumulate(lengths, initial=0)
        width = max(map(len, tables))
        flat = [block for table in tables for block in (*table, *[0] * (width - len(table)))]
        staged = upload_ints([*tokens, *positions, *slots, *wanted, *starts, *ends, *lengths, *flat], self._data.device)
        rows = len(spans)
        ids, at, into, wanted_rows, cu_queries, cu_keys, num_keys, flat_tables = staged.split_with_sizes(
            [total, total, total, len(wanted), rows + 1, rows + 1, rows, rows * width]
        )
        hidden = functional.embedding(ids, self._weights.embedding)
        for start, inputs in embedded:
            hidden[start : start + len(inputs)] = inputs.to(hidden.device, hidden.dtype)
        query_lens = [span.num_tokens for span in spans]
        batch = PagedBatch(
            query_lens=query_lens,
            key_lens=lengths,
            tables=tables,
            cu_queries=cu_queries.clone(),  # a kernel may want it aligned
            cu_keys=cu_keys.clone(),
            num_keys=num_keys.clone(),
            block_tables=flat_tables.view(rows, width).clone(),
            max_queries=max(query_lens),
            max_keys=max(lengths),
        )
        self._attention.plan(batch)
        return self._forward(hidden, at, into.long(), batch, None if len(wanted) == total else wanted_rows)

    def _decode(self, inputs: DecodeInputs, batch: PagedBatch) -> torch.Tensor:
        rows = len(batch.num_keys)
        hidden = functional.embedding(inputs.tokens(rows), self._weights.embedding)
        return self._forward(hidden, inputs.positions(rows), inputs.slots(rows), batch, None)

    def _forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        batch: PagedBatch,
        wanted: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits [wanted, vocab_size] in the model's dtype, of all tokens for None. `hidden` is used up."""
        w = self._weights
        cos, sin = (table.index_select(0, positions).unsqueeze(1) for table in (self._cos, self._sin))
        for i, layer in enumerate(self._layers):
            own = layer.own
            q = self._write_kv(i, layer, hidden, cos, sin, slots)
            last = i == len(self._layers) - 1
            if last and wanted is not None and len(wanted) == 0:
                break  # only keys and values were asked for, and they are all in place
            keys, values = self._blocks[i]
            attended = self._attention(q, keys, values, batch, own.window).flatten(1)
            if last and wanted is not None:
                attended, hidden = attended.index_select(0, wanted), hidden.index_select(0, wanted)
            _add_product(hidden, attended, own.o, own.o_bias)
            normed = functional.rms_norm(hidden, (hidden.shape[-1],), own.mlp_norm, w.eps)
            gate, up = functional.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            _add_product(hidden, functional.silu(gate).mul_(up), own.down, own.down_bias)
        if wanted is not None:
            hidden = hidden[: len(wanted)]
        hidden = functional.rms_norm(hidden, (hidden.shape[-1],), w.norm, w.eps)
        logits: torch.Tensor = functional.linear(hidden, w.lm_head, w.lm_head_bias)
        return logits

    def _write_kv(
        self,
        index: int,
        layer: _FusedLayer,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """Put the tokens' keys and values into their slots; returns the queries [tokens, num_heads, head_dim]."""
        w, own = self._weights, layer.own
        normed = functional.rms_norm(hidden, (hidden.shape[-1],), own.input_norm, w.eps)
        qkv = functional.linear(normed, layer.qkv, layer.qkv_bias).view(len(hidden), -1, w.head_dim)
        q, k, _ = qkv.split_with_sizes([w.num_heads, w.num_kv_heads, w.num_kv_heads], dim=1)
        if own.q_norm is not None and own.k_norm is not None:
            q.copy_(functional.rms_norm(q, (w.head_dim,), own.q_norm, w.eps))
            k.copy_(functional.rms_norm(k, (w.head_dim,), own.k_norm, w.eps))
        turned = qkv[:, : w.num_heads + w.num_kv_heads]
        # In float32, the tables' dtype; rounded when it is written back.
        turned.copy_((turned * cos).addcmul_(turned.roll(w.head_dim // 2, dims=-1), sin))
        kv = qkv[:, w.num_heads :].view(len(hidden), 2, w.num_kv_heads, w.head_dim)
        self._data[index].index_copy_(1, slots, kv.transpose(0, 1))
        return q


def fuse(weights: DecoderWeights) -> list[_FusedLayer]:
    """Join the matrices that read the same input, and let the parameters they came from be views of the result.

    No value changes. Layer by layer, so that one layer at most is held twice. Outside inference mode, so that the
    model's parameters stay ordinary tensors.
    """
    layers = []
    with torch.inference_mode(False), torch.no_grad():
        for own in weights.layers:
            layers.append(
                _FusedLayer(
                    qkv=_join(own.q, own.k, own.v),
                    qkv_bias=_join_biases(own.q_bias, own.k_bias, own.v_bias),
                    gate_up=_join(own.gate, own.up),
                    gate_up_bias=_join_biases(own.gate_bias, own.up_bias),
                    own=own,
                )
            )
            if own.q.is_cuda:
                torch.cuda.empty_cache()  # the old pieces are too small for the next layer's joined ones
    return layers


def _join(*parameters: torch.Tensor) -> torch.Tensor:
    """[sum of outputs, inputs]; the memory itself where an earlier decoder has joined them already."""
    lengths = [len(parameter) for parameter in parameters]
    first, width = parameters[0].detach(), prod(parameters[0].shape[1:])
    if all(
        parameter.is_contiguous()
        and parameter.data_ptr() == first.data_ptr() + offset * first.element_size()
        and parameter.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for parameter, offset in zip(parameters, accumulate((n * width for n in lengths), initial=0), strict=False)
    ):
        return first.as_strided((sum(lengths), *first.shape[1:]), first.stride())
    joined = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, view in zip(parameters, joined.split_with_sizes(lengths), strict=True):
        parameter.data = view
    return joined


def _join_biases(*biases: torch.Tensor | None) -> torch.Tensor | None:
    present = [bias for bias in biases if bias is not None]
    assert len(present) in (0, len(biases)), "biases on some of the matrices that read the same input"
    return _join(*present) if present else None


def _add_product(hidden: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
    """hidden += x @ matrix.T + bias"""
    hidden.addmm_(x, matrix.t())
    if bias is not None:
        hidden += bias
