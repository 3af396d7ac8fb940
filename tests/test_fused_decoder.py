"""The fused decoder equals transformers' own forward: every attention, eager and as graphs, whatever is mixed."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partialmethod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch.nn import functional
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from app.engine import attention_kernels
from app.engine.attention_check import Faulty, Unavailable, check_attention
from app.engine.attention_kernels import FlashInferAttention, VarlenAttention, choose_attention, preferred_block_size
from app.engine.cuda_graphs import BUCKETS, upload_ints
from app.engine.decoder import FusedDecoder
from app.engine.forward import Forward, Span
from app.engine.kv_cache import KVCache
from app.engine.loaded_model import self_check_tolerance
from app.engine.model_runner import self_check, self_check_blocks
from app.engine.paged_attention import Geometry
from app.engine.transformers_forward import TransformersForward
from app.engine.weights import decoder_weights
from app.errors import InvalidBaseModel
from tests import attention_emulation
from tests.attention_emulation import FlashInfer, Varlen, attend, pages
from tests.tiny import MAX_MODEL_LEN, VOCAB_SIZE, tiny_info, tiny_model

MODELS = ("llama", "llama-biases", "qwen2", "qwen2-mixed", "qwen3", "mistral")
BACKENDS = ("reference", "varlen", "varlen-fa3", "flashinfer")
WINDOW = 24
TOLERANCE = 1e-4
LLAMA = tiny_model("llama")  # for its configuration
LLAMA_INFO = tiny_info(LLAMA)


def family_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    if name in ("llama", "qwen2"):
        return tiny_model(name).to(dtype)
    common: dict[str, Any] = LLAMA.config.to_diff_dict()
    for key in ("architectures", "dtype", "transformers_version", "model_type", "head_dim"):
        common.pop(key, None)
    match name:
        case "llama-biases":
            config = LLAMA.config.__class__(**common | {"attention_bias": True, "mlp_bias": True})
        case "qwen2-mixed":
            config = Qwen2Config(
                **common | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
            )
        case "qwen3":
            config = Qwen3Config(**common, head_dim=16)
        case "mistral":
            config = MistralConfig(**common, sliding_window=WINDOW, head_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval().requires_grad_(False)


class RerunGraphs:
    """Stands in for CUDA graphs: a replay does again what was captured, into the memory it was captured with."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.replays = 0

    def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        output = run()
        self.captured.append(len(output))

        def replay() -> torch.Tensor:
            self.replays += 1
            return output.copy_(run())

        return replay


def make(
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    *,
    backend: str = "reference",
    graphs: bool = False,
    num_blocks: int = 80,
) -> SimpleNamespace:
    """A decoder whose every block except block 0 holds garbage."""
    emulation: Any = None
    kind: Any = backend.partition("-")[0]
    block_size = 256 if backend == "varlen" else 16
    if kind == "varlen":
        impl = "FA2" if backend == "varlen" else "FA3"
        emulation = Varlen(impl)
        monkeypatch.setattr(attention_kernels, "_load_varlen", lambda _: (emulation, impl))
    elif kind == "flashinfer":
        emulation = FlashInfer()
        monkeypatch.setattr(attention_kernels, "_load_flashinfer", lambda _: emulation)
    monkeypatch.setattr(attention_kernels, "KERNEL_DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(attention_kernels, "FLASHINFER_HEAD_DIMS", (8, 16))
    monkeypatch.setattr(attention_kernels, "_WORKSPACE_BYTES", 1024)
    info = tiny_info_of(model)
    cache = KVCache(info, num_blocks=num_blocks, block_size=block_size, dtype=model.dtype, device=model.device)
    cache.data[:, :, block_size:] = torch.nan
    weights = decoder_weights(model, MAX_MODEL_LEN)
    assert weights is not None
    backend_of_graphs = RerunGraphs() if graphs else None
    forward = FusedDecoder(model, weights, cache, attention=kind, graphs=graphs, graph_backend=backend_of_graphs)
    if hasattr(emulation, "calls"):
        emulation.calls.clear()
    return SimpleNamespace(
        forward=forward,
        cache=cache,
        weights=weights,
        graphs=backend_of_graphs,
        emulation=emulation,
        blocks=random.Random(5).sample(range(1, num_blocks), num_blocks - 1),
    )


def tiny_info_of(model: PreTrainedModel) -> Any:
    return replace(LLAMA_INFO, head_dim=head_dim_of(model))


def head_dim_of(model: Any) -> int:
    return int(model.model.layers[0].self_attn.head_dim)


class Row:
    """A text, perhaps behind virtual tokens, and what transformers says of its every position."""

    def __init__(self, model: Any, made: SimpleNamespace, length: int, seed: int, *, virtual: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
        embedding = model.get_input_embeddings()
        self.virtual = embedding.weight.mean() + torch.randn(
            virtual, embedding.weight.shape[1], generator=generator
        ).to(model.dtype)
        inputs = torch.cat((self.virtual, embedding(torch.tensor(self.ids))))
        with torch.inference_mode():
            self.expected = model(inputs_embeds=inputs[None], use_cache=False).logits[0].float()
        self.length = virtual + length
        size = made.cache.block_size
        self.table = [made.blocks.pop() for _ in range(-(-self.length // size))]
        self.done = 0

    def span(self, count: int, num_logits: int) -> Span:
        """The next `count` positions; never text and virtual tokens in one."""
        virtual = len(self.virtual)
        end = min(self.done + count, virtual if self.done < virtual else self.length)
        inputs = self.virtual[self.done : end] if self.done < virtual else self.ids[self.done - virtual : end - virtual]
        span = Span(self.table, self.done, end, inputs, min(num_logits, end - self.done))
        self.done = end
        return span


def compare(forward: Forward, pairs: list[tuple[Row, Span]], tolerance: float = TOLERANCE) -> None:
    logits = forward([span for _, span in pairs])
    expected = torch.cat([row.expected[span.end - span.num_logits : span.end] for row, span in pairs])
    assert logits.dtype == torch.float32 and logits.shape == expected.shape
    if len(expected):
        worst = (logits - expected).abs().amax(dim=1)
        assert worst.max() < tolerance, worst


def run_schedule(forward: Forward, rows: list[Row], seed: int, tolerance: float = TOLERANCE) -> None:
    """Everything at random: which rows take part in a step, in which order, with how much, and who wants logits."""
    choose = random.Random(seed)
    while unfinished := [row for row in rows if row.done < row.length]:
        taking = choose.sample(unfinished, choose.randint(1, len(unfinished)))
        decoding = choose.random() < 0.6
        pairs = []
        for row in taking:
            count = 1 if decoding or choose.random() < 0.3 else choose.randint(1, 30)
            pairs.append((row, row.span(count, 1 if decoding else choose.choice((0, 1, 1, count)))))
        compare(forward, pairs, tolerance)


# -- against transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_any_mix_equals_the_models_own_forward(
    name: str, backend: str, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model(name)
    made = make(model, monkeypatch, backend=backend, graphs=graphs)
    rows = [
        Row(model, made, length, seed, virtual=virtual)
        for seed, (length, virtual) in enumerate([(1, 0), (15, 0), (16, 20), (33, 0), (70, 0), (40, 7), (50, 0)])
    ]
    run_schedule(made.forward, rows, seed=3)
    if graphs:
        assert made.graphs.replays > 10 and len(set(made.graphs.captured)) > 2
        assert len(set(made.graphs.captured)) == len(made.graphs.captured), "a size is captured once"
    if backend == "flashinfer":
        assert made.emulation.decode_plans > 10 if graphs else made.emulation.prefill_plans > 10


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_bfloat16_is_as_near_to_float32_as_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, model = family_model(name), family_model(name, torch.bfloat16)
    exact.load_state_dict(model.state_dict())  # the same values
    made = make(model, monkeypatch)
    rows = [Row(model, made, length, seed) for seed, length in enumerate((40, 25, 33))]
    ours_errors, theirs_errors = [], []
    for row in rows:
        with torch.inference_mode():
            truth = exact(torch.tensor([row.ids]), use_cache=False).logits[0]
        span = row.span(row.length, row.length)
        ours_errors.append((made.forward([span]) - truth).abs().mean())
        theirs_errors.append((row.expected - truth).abs().mean())
    assert sum(ours_errors) < 1.5 * sum(theirs_errors)


def test_the_norm_is_the_models_within_one_rounding() -> None:
    x = 3 * torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = 1 + 0.2 * torch.randn(256, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    ours = functional.rms_norm(x, (256,), weight, 1e-6).double()
    assert ((ours - exact).abs() <= exact.abs() * 2.0**-8 + 1e-9).all()


def test_a_row_alone_is_the_row_in_the_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model("qwen2-mixed")
    found = []
    for others in (0, 5):
        made = make(model, monkeypatch)
        row = Row(model, made, 45, 0)
        rest = [Row(model, made, 10 * i + 1, i) for i in range(1, others + 1)]
        made.forward([*(r.span(20, 1) for r in rest), row.span(40, 1)])
        found.append(made.forward([row.span(1, 1), *(r.span(5, 1) for r in rest if r.done < r.length)])[0])
    assert (found[0] - found[1]).abs().max() < 1e-4


# -- the weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_fusing_changes_no_value_and_holds_none_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = torch.arange(1, 60)[None]
    logits = model(ids, use_cache=False).logits
    made = make(model, monkeypatch)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert torch.equal(logits, model(ids, use_cache=False).logits)
    assert not any(parameter.is_inference() or parameter.requires_grad for parameter in model.parameters())
    for layer, fused in zip(made.weights.layers, made.forward._layers, strict=True):
        for part, whole in ((layer.q, fused.qkv), (layer.v, fused.qkv), (layer.gate, fused.gate_up)):
            assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    # A second decoder of the same model takes the memory as it is.
    again = FusedDecoder(model, made.weights, made.cache)
    assert all(a.qkv.data_ptr() == b.qkv.data_ptr() for a, b in zip(again._layers, made.forward._layers, strict=True))
    assert torch.equal(logits, model(ids, use_cache=False).logits)


def test_parameters_that_share_memory_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a file that was read in one piece: one storage alone does not make them joined."""
    model = family_model("qwen2")
    for layer in model.model.layers:
        for parts in (
            [layer.self_attn.v_proj, layer.self_attn.q_proj, layer.self_attn.k_proj],
            [layer.mlp.up_proj, layer.mlp.gate_proj],
        ):
            memory = torch.cat([part.weight for part in parts])
            for part, view in zip(parts, memory.split([len(part.weight) for part in parts]), strict=True):
                part.weight.data = view
    made = make(model, monkeypatch)
    row = Row(model, made, 30, 0)
    compare(made.forward, [(row, row.span(30, 30))])


# -- what must not be read or written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays_in_its_row(backend: str, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model("mistral")
    made = make(model, monkeypatch, backend=backend, graphs=graphs)
    broken = Row(model, made, 30, 0, virtual=4)
    broken.virtual[2] = torch.nan
    rows = [Row(model, made, 30, seed) for seed in (1, 2, 3)]
    made.forward([rows[0].span(8, 1), broken.span(4, 1), *(row.span(8, 1) for row in rows[1:])])
    for count in (9, 1, 1, 1):
        pairs = [(row, row.span(count, 1)) for row in rows]
        logits = made.forward([pairs[0][1], broken.span(count, 1), *(span for _, span in pairs[1:])])
        assert logits[1].isnan().all()
        for found, (row, span) in zip(logits[[0, 2, 3]], pairs, strict=True):
            assert (found - row.expected[span.end - 1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_only_the_rows_slots_are_written(graphs: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's padding rows may use the last slot of block 0, which nobody reads; slot 0 stays zero."""
    model = family_model("qwen2")  # with biases: even padding has keys and values
    made = make(model, monkeypatch, backend=backend, graphs=graphs)
    rows = [Row(model, made, 40, seed) for seed in range(5)]
    made.forward([row.span(5 + 7 * i, 1) for i, row in enumerate(rows)])
    before = made.cache.data.clone()
    spans = [row.span(1, 1) for row in rows]
    made.forward(spans)
    changed = (made.cache.data.nan_to_num(nan=7.0) != before.nan_to_num(nan=7.0)).flatten(3).any(-1).any(0).any(0)
    slots = {int(made.cache.slots(span.block_table, span.start, span.end)) for span in spans}
    assert set(changed.nonzero().flatten().tolist()) == slots | ({made.cache.block_size - 1} if graphs else set())
    assert not made.cache.data[:, :, 0].any()


def test_logits_are_the_callers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model("llama")
    made = make(model, monkeypatch, graphs=True)
    rows = [Row(model, made, 20, seed) for seed in range(3)]
    first = made.forward([row.span(1, 1) for row in rows])
    kept = first.clone()
    made.forward([row.span(1, 1) for row in rows])
    assert torch.equal(first, kept)


def test_nobody_asks_for_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model("llama")
    made = make(model, monkeypatch, graphs=True)
    row = Row(model, made, 30, 0, virtual=10)
    assert made.forward([row.span(10, 0)]).shape == (0, VOCAB_SIZE)
    assert made.forward([row.span(1, 0)]).shape == (0, VOCAB_SIZE)
    assert made.forward([]).shape == (0, VOCAB_SIZE)
    compare(made.forward, [(row, row.span(29, 29))])


def test_positions_that_the_model_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(family_model("llama"), monkeypatch)
    with pytest.raises(ValueError, match="512"):
        made.forward([Span(list(range(1, 40)), MAX_MODEL_LEN, MAX_MODEL_LEN + 1, [1], 1)])


def test_what_describes_a_step_is_on_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any device, also those (mps) that are neither the CPU nor CUDA."""
    meta = torch.device("meta")
    assert upload_ints([1, 2, 3], meta).device == meta
    model = family_model("llama")
    made = make(model, monkeypatch)
    forward = FusedDecoder(model, made.weights, made.cache)
    forward._data = made.cache.data.to(meta)  # a device whose tensors say where they are, and nothing else
    devices = []

    def record(hidden: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, batch: Any, wanted: Any) -> Any:
        devices.extend(
            t.device for t in (hidden, positions, slots, wanted, *vars(batch).values()) if torch.is_tensor(t)
        )
        return torch.zeros(1)

    monkeypatch.setattr(forward, "_forward", record)
    monkeypatch.setattr(forward._attention, "plan", lambda _: None)
    monkeypatch.setattr(functional, "embedding", lambda ids, _: torch.zeros(len(ids), 32, device=ids.device))
    forward([Span([1], 0, 4, [1, 2, 3, 4], 1), Span([2], 0, 2, torch.zeros(2, 32), 0)])
    assert len(devices) == 8 and set(devices) == {meta}


# -- graphs ------------------------------------------------------------------------------------------------------------


def test_every_size_of_batch_up_to_the_largest_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model("llama")
    made = make(model, monkeypatch, graphs=True, num_blocks=300)
    rows = [Row(model, made, 8, seed) for seed in range(257)]
    for count in (1, 2, 3, 4, 5, 17, 33, 97, 256):
        chosen = random.Random(count).sample([row for row in rows if row.done < row.length], count)
        compare(made.forward, [(row, row.span(1, 1)) for row in chosen])
    assert made.graphs.captured == [1, 2, 4, 8, 24, 48, 128, 256] and set(made.graphs.captured) <= set(BUCKETS)
    assert made.graphs.replays == 9
    compare(made.forward, [(row, row.span(1, 1)) for row in rows if row.done < row.length][:257])


def test_tables_that_shrink_and_move_between_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long row leaves its numbers in the buffers; the next rows in them are shorter."""
    model = family_model("mistral")
    made = make(model, monkeypatch, graphs=True)
    long, *short = [Row(model, made, length, seed) for seed, length in enumerate((300, 40, 40, 3))]
    made.forward([row.span(row.length - 3, 0) for row in (long, *short[:2])])
    compare(made.forward, [(row, row.span(1, 1)) for row in (short[0], long, short[1])])
    compare(made.forward, [(row, row.span(1, 1)) for row in (short[2], short[0], short[1], long)])
    compare(made.forward, [(row, row.span(1, 1)) for row in (long, short[2], short[1])])


class FailingGraphs(RerunGraphs):
    """Captures a few sizes, then no more."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        if len(self.captured) == self._limit:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().capture(run)


@pytest.mark.parametrize("limit", [0, 2])
def test_a_capture_that_fails_ends_the_graphs_only(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_fused_decoder.RerunGraphs", lambda: FailingGraphs(limit))
    model = family_model("mistral")
    made = make(model, monkeypatch, backend="flashinfer", graphs=True)
    assert "CUDA graphs on" in made.forward.describe
    run_schedule(made.forward, [Row(model, made, 40, seed) for seed in range(6)], seed=1)
    assert "CUDA graphs off (not used: a graph for" in made.forward.describe
    assert "not permitted when stream is capturing" in made.forward.describe
    assert len(made.graphs.captured) == limit


def test_a_want_of_memory_at_a_capture_passes_and_graphs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model("mistral")
    made = make(model, monkeypatch, graphs=True)
    row, capture = Row(model, made, 40, seed=1), made.graphs.capture
    compare(made.forward, [(row, row.span(20, 1))])

    def full(_: Any) -> Any:
        raise torch.OutOfMemoryError("no room for the graph")

    monkeypatch.setattr(made.graphs, "capture", full)
    span = row.span(1, 1)
    with pytest.raises(torch.OutOfMemoryError):
        made.forward([span])
    monkeypatch.setattr(made.graphs, "capture", capture)
    compare(made.forward, [(row, span)])
    assert made.graphs.replays and "CUDA graphs on" in made.forward.describe


# -- the check at start ------------------------------------------------------------------------------------------------


def check_at_start(
    model: Any, made: SimpleNamespace, forward: Forward, *, blocks: int | None = None, tolerance: float = 1e-3
) -> None:
    info = replace(tiny_info_of(model), architecture=type(model).__name__)
    size = made.cache.block_size
    count = self_check_blocks(model, info, size) if blocks is None else blocks
    self_check(forward, model, info, made.blocks[:count], size, tolerance=tolerance)


def test_how_far_the_check_at_start_lets_logits_be() -> None:
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    assert self_check_tolerance(float32, 2) == self_check_tolerance(float32, 1000) == 0.05  # far above its noise
    assert self_check_tolerance(float32, 32, "int8") == 0.2
    assert self_check_tolerance(bfloat16, 1) == self_check_tolerance(bfloat16, 28) == 0.25
    assert self_check_tolerance(bfloat16, 32) > 2.5 * 0.0994  # what a right Llama of 8 B was found to have
    assert self_check_tolerance(float16, 32) == 0.05 < self_check_tolerance(float16, 100)
    assert self_check_tolerance(bfloat16, 80) < self_check_tolerance(bfloat16, 10_000) == 0.5


@pytest.mark.parametrize("blocks", [None, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "qwen2-mixed", "mistral"])
def test_the_check_at_start_captures_and_replays(
    name: str, backend: str, blocks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model(name)
    made = make(model, monkeypatch, backend=backend, graphs=True)
    check_at_start(model, made, made.forward, blocks=blocks)
    assert made.graphs.captured == [2] and made.graphs.replays == 2


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt2", "mistral"])
def test_the_check_at_start_passes_what_transformers_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    cache = KVCache(tiny_info(model), num_blocks=80, block_size=16, dtype=torch.float32, device=model.device)
    made = SimpleNamespace(cache=cache, blocks=list(range(1, 80)))
    forward = TransformersForward(model, cache)
    tables = []

    def watched(spans: Sequence[Span]) -> torch.Tensor:
        tables.extend((span.block_table, span.end) for span in spans)
        return forward(spans)

    monkeypatch.setattr(
        "tests.test_fused_decoder.tiny_info_of", lambda _: replace(tiny_info(model), architecture=type(model).__name__)
    )
    check_at_start(model, made, watched)
    window = 0 if name == "gpt2" else WINDOW
    assert max(end for _, end in tables) > window + 16
    if name == "gemma3":  # its embeddings are scaled: those of the weights alone are others
        scale = model.get_input_embeddings().embed_scale.clone()
        wrong = TransformersForward(model, cache)

        def unscaled(spans: Sequence[Span]) -> torch.Tensor:
            return wrong([replace(s, inputs=s.inputs / scale) if torch.is_tensor(s.inputs) else s for s in spans])

        with pytest.raises(InvalidBaseModel):
            check_at_start(model, made, unscaled)


WRONG_SPANS: dict[str, Callable[[Span], Span]] = {
    "one block only": lambda s: replace(s, block_table=[s.block_table[0]] * len(s.block_table)),
    "embeddings of others": lambda s: replace(s, inputs=s.inputs.flip(0)) if torch.is_tensor(s.inputs) else s,
    "decodes another token": lambda s: replace(s, inputs=[5]) if s.num_tokens == 1 else s,
}


DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("num_layers", [3, 80])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", WRONG_SPANS)
def test_the_check_at_start_sees(
    fault: str, dtype: torch.dtype, num_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the limit of a deep model, which lets most pass."""
    model = family_model("llama", dtype)
    made = make(model, monkeypatch)
    limit = self_check_tolerance(dtype, num_layers)
    check_at_start(model, made, made.forward, tolerance=limit)
    with pytest.raises(InvalidBaseModel, match="differ"):
        check_at_start(
            model, made, lambda spans: made.forward([WRONG_SPANS[fault](span) for span in spans]), tolerance=limit
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fault", ["no positions", "no window", "window too wide", "stale graph", "rows of a graph swapped"]
)
def test_the_check_at_start_sees_in_the_decoder(
    fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model("mistral", dtype)
    made = make(model, monkeypatch, graphs="graph" in fault)
    if "graph" in fault:
        original = made.graphs.capture

        def capture(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
            replay = original(run)
            first = replay().clone()
            return (lambda: first) if fault == "stale graph" else (lambda: replay().flip(0))

        monkeypatch.setattr(made.graphs, "capture", capture)
    elif fault == "no positions":
        weights = replace(made.weights, cos=torch.ones_like(made.weights.cos), sin=torch.zeros_like(made.weights.sin))
        made.forward = FusedDecoder(model, weights, made.cache)
    else:
        window = 0 if fault == "no window" else WINDOW + 1
        weights = replace(made.weights, layers=tuple(replace(layer, window=window) for layer in made.weights.layers))
        made.forward = FusedDecoder(model, weights, made.cache)
    with pytest.raises(InvalidBaseModel, match="differ"):
        check_at_start(model, made, made.forward, tolerance=self_check_tolerance(dtype, 3))


# -- what the kernels are told -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_arguments_of_varlen_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model(name)
    made = make(model, monkeypatch, backend="varlen", graphs=True)
    rows = [Row(model, made, 30, seed) for seed in range(3)]
    made.forward([row.span(4 + i, 1) for i, row in enumerate(rows)])
    window = (WINDOW - 1, 0) if name == "mistral" else None
    assert made.emulation.calls == [{"window_size": window or (-1, 0), "max_q": 6, "max_k": 6, "rows": 3}] * 3
    made.emulation.calls.clear()
    made.forward([row.span(1, 1) for row in rows])
    # Padded to 4 rows; a graph must allow for every length that may come.
    single = {"window_size": window or (-1, -1), "max_q": 1, "max_k": MAX_MODEL_LEN, "rows": 4}
    assert made.emulation.calls and all(call == single for call in made.emulation.calls)


@pytest.fixture
def geometry() -> Iterator[Geometry]:
    yield Geometry(
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        max_blocks=100,
        scale=0.125,
        windows=(0, 24),
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )


def test_why_a_kernel_cannot_be_had(geometry: Geometry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    with pytest.raises(Unavailable, match="multiples of 256, not 16"):
        VarlenAttention(geometry)
    with pytest.raises(Unavailable, match="no kernel for torch.float32"):
        VarlenAttention(replace(geometry, dtype=torch.float32))
    with pytest.raises(Unavailable, match="heads of 96"):
        FlashInferAttention(replace(geometry, head_dim=96))
    with pytest.raises(Unavailable, match="CUDA"):
        VarlenAttention(replace(geometry, device=torch.device("cpu")))
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(Unavailable, match="not installed"):
        FlashInferAttention(geometry)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key, value, seqused_k: None)
    with pytest.raises(Unavailable, match="lacks block_table, enable_gqa, num_splits"):
        VarlenAttention(replace(geometry, block_size=256))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 5))
    with pytest.raises(Unavailable, match=r"capability 8\.0, the card has 7\.5"):
        VarlenAttention(replace(geometry, dtype=torch.float16))
    with pytest.raises(Unavailable, match=r"capability 8\.0, the card has 7\.5"):
        FlashInferAttention(geometry)
    for kind in ("varlen", "flashinfer"):
        with pytest.raises(Unavailable, match="capability") as raised:
            choose_attention(kind, geometry)  # type: ignore[arg-type]
        assert type(raised.value) is Unavailable


def test_the_block_size_that_a_kernel_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")

    def size(device: torch.device, dtype: torch.dtype, head_dim: int = 64, fused: bool = True) -> int:
        return preferred_block_size(device, dtype, 16, head_dim=head_dim, fused=fused)

    assert size(cpu, torch.bfloat16) == 16
    assert size(cuda, torch.float32) == 16
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with monkeypatch.context() as older:  # torch before 2.13, whose FlashAttention-2 knows no blocks
        older.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key, value: None)
        assert size(cuda, torch.bfloat16) == 16
    monkeypatch.setattr(attention_kernels, "_find_varlen", lambda: None)
    assert size(cuda, torch.bfloat16) == size(cuda, torch.bfloat16, 96) == 256
    # Nothing that pages blocks of 256 would run these.
    assert size(cuda, torch.bfloat16, fused=False) == size(cuda, torch.bfloat16, 100) == 16
    assert size(cuda, torch.bfloat16, 264) == 16
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert size(cuda, torch.bfloat16) == 16
    assert size(cuda, torch.bfloat16, 96) == 256  # FlashInfer does not have such heads
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 5))
    assert size(cuda, torch.float16) == 16


class Event:
    """A CUDA event as `log` sees it."""

    def __init__(self, log: list[str], number: int) -> None:
        self._log, self._number = log, number

    def synchronize(self) -> None:
        self._log.append(f"wait {self._number}")

    def record(self, _: Any) -> None:
        self._log.append(f"record {self._number}")


def test_a_plan_waits_until_the_device_has_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies in pinned memory that the next plan of the same wrapper fills again."""
    log: list[str] = []
    numbers = iter(range(100))
    monkeypatch.setattr(attention_kernels, "_new_event", lambda _: Event(log, next(numbers)))
    monkeypatch.setattr("torch.cuda.current_stream", lambda _: None)
    for name in ("_Prefill", "_Decode"):

        def plan(self: Any, *arguments: Any, _original: Any, **options: Any) -> None:
            log.append("plan")
            _original(self, *arguments, **options)

        original = getattr(attention_emulation, name).plan
        monkeypatch.setattr(getattr(attention_emulation, name), "plan", partialmethod(plan, _original=original))
    model = family_model("qwen2-mixed")  # two windows, two wrappers
    made = make(model, monkeypatch, backend="flashinfer", graphs=True)
    log.clear()
    row = Row(model, made, 30, 0)
    for count in (9, 4, 1, 1):
        compare(made.forward, [(row, row.span(count, 1))])
    assert len(log) == 3 * 2 * 4
    steps = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert all(step == [f"wait {step[0][5:]}", "plan", f"record {step[0][5:]}"] for step in steps)
    waited = [step[0] for step in steps]
    assert waited[:2] == waited[2:4] and waited[4:6] == waited[6:] and len(set(waited)) == 4


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="block tables came with torch 2.13")
def test_torch_2_13_has_what_varlen_attention_needs(geometry: Geometry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    assert VarlenAttention(replace(geometry, block_size=256)).name == "varlen (FA2)"


BROKEN: dict[str, Callable[..., torch.Tensor]] = {
    "top-left causal": lambda q, k, v, scale, left, right: attend(
        torch.cat((q, torch.zeros(len(k) - len(q), *q.shape[1:], dtype=q.dtype))), k, v, scale, left=left, right=right
    )[: len(q)],
    "window one too wide": lambda q, k, v, scale, left, right: attend(
        q, k, v, scale, left=left + (left >= 0), right=right
    ),
    "key heads interleaved": lambda q, k, v, scale, left, right: attend(
        q, k.flip(1), v.flip(1), scale, left=left, right=right
    ),
    "no scale": lambda q, k, v, scale, left, right: attend(q, k, v, 1.0, left=left, right=right),
}


@pytest.mark.parametrize("fault", [*BROKEN, "rows after the first unwritten", "reads behind the end"])
def test_a_kernel_that_is_wrong_is_not_taken(fault: str, geometry: Geometry, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = replace(geometry, device=torch.device("cpu"))
    kernel = Varlen("FA3")
    monkeypatch.setattr(attention_kernels, "_load_varlen", lambda _: (kernel, "FA3"))
    check_attention(VarlenAttention(geometry), geometry)
    if fault in BROKEN:
        monkeypatch.setattr("tests.attention_emulation.attend", BROKEN[fault])
    elif fault == "reads behind the end":  # with weight 0, which does not make NaN go away
        monkeypatch.setattr(
            "tests.attention_emulation.pages",
            lambda pool, table, n: pages(pool, table, n) + 0 * pool[table[(n - 1) // pool.shape[1]].long()].sum(),
        )
    else:  # pytorch#194167
        monkeypatch.setattr(
            attention_kernels,
            "_load_varlen",
            lambda _: (lambda *a, **k: kernel(*a, **k).index_fill_(0, torch.tensor(1), torch.nan), "FA3"),
        )
    with pytest.raises(Faulty, match="differs"):
        check_attention(VarlenAttention(geometry), geometry)
    chosen, reasons = choose_attention("auto", geometry)
    assert chosen.name == "reference"
    found = {str(reason).partition(":")[0]: type(reason) for reason in reasons}
    assert found == {
        "flashinfer attention": Unavailable,
        "varlen attention": Faulty,
        "triton attention": Unavailable,
    }
    with pytest.raises(Faulty, match="varlen attention: differs"):
        choose_attention("varlen", geometry)


@pytest.mark.parametrize("window", [24, 512, 600, 1299, 1300, 4096])
def test_the_check_of_kernels_exceeds_their_windows(
    window: int, geometry: Geometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = replace(geometry, device=torch.device("cpu"), windows=(0, window), max_blocks=1 + 4200 // 16)
    assert geometry.block_size == 16
    monkeypatch.setattr(attention_kernels, "_load_varlen", lambda _: (Varlen("FA3"), "FA3"))
    check_attention(VarlenAttention(geometry), geometry)
    monkeypatch.setattr("tests.attention_emulation.attend", BROKEN["window one too wide"])
    with pytest.raises(Faulty, match=f"window {window}"):
        check_attention(VarlenAttention(geometry), geometry)


@pytest.mark.parametrize("stage", ["load", "init", "plan", "run"])
def test_a_kernel_that_fails_is_faulty(stage: str, geometry: Geometry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike one that cannot exist here: somebody has to look at it."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("nvcc not found")

    emulation = FlashInfer()
    monkeypatch.setattr(attention_kernels, "_WORKSPACE_BYTES", 1024)
    monkeypatch.setattr(attention_kernels, "_load_flashinfer", fail if stage == "load" else lambda _: emulation)
    if stage == "init":
        emulation.BatchPrefillWithPagedKVCacheWrapper = fail
    elif stage != "load":
        monkeypatch.setattr(f"tests.attention_emulation._Prefill.{stage}", fail)
    geometry = replace(geometry, device=torch.device("cpu"))
    with pytest.raises(Faulty, match="flashinfer attention: nvcc not found"):
        choose_attention("flashinfer", geometry)
    _, reasons = choose_attention("auto", geometry)
    assert [type(reason) for reason in reasons] == [Faulty, Unavailable, Unavailable]


def test_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model("llama")
    made = make(model, monkeypatch)
    assert made.forward.describe == ("fused LlamaForCausalLM in float32 on cpu, attention reference, CUDA graphs off")
    monkeypatch.undo()
    assert "attention reference" in FusedDecoder(model, made.weights, made.cache).describe
    for kind in ("varlen", "flashinfer", "triton"):
        with pytest.raises(Unavailable, match=kind):
            FusedDecoder(model, made.weights, made.cache, attention=kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="CUDA"):
        FusedDecoder(model, made.weights, made.cache, graphs=True)
