"""The native decoder against transformers' own forward, against itself in other company, and its build cache."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from app.engine.forward import Span
from app.engine.kv_cache import KVCache
from app.engine.native import build
from app.engine.native import panels as native_panels
from app.engine.native.build import NativeUnavailable
from app.engine.native.decoder import NativeDecoder
from app.engine.native.panels import Packer, Storage
from app.engine.weights import decoder_weights
from tests.tiny import MAX_MODEL_LEN, tiny_info, tiny_model

Quantization = Literal["int8"] | None
BLOCK_SIZE = 4
NUM_BLOCKS = 160
COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_MODEL_LEN,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CONFIGS = {
    "mistral": MistralConfig(**COMMON, sliding_window=24, tie_word_embeddings=False),
    "qwen3": Qwen3Config(
        **COMMON, attention_bias=True, use_sliding_window=True, sliding_window=24, max_window_layers=1
    ),
    # No size is a multiple of 16, 7 query heads share one pair of key and value, heads of 40 = 32 + 8.
    "odd": LlamaConfig(
        **COMMON
        | {"hidden_size": 35, "intermediate_size": 51, "vocab_size": 107, "num_hidden_layers": 2, "head_dim": 40}
        | {"num_attention_heads": 7, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        tie_word_embeddings=False,
    ),
}
MODELS = ("llama", "qwen2", *CONFIGS)
LLAMA_INFO = tiny_info(tiny_model("llama"))


@pytest.fixture(scope="module", autouse=True)
def kernel_dir() -> Path:
    """Where the kernel is built. Skips where it cannot be."""
    try:
        path = build.build()
        build.load_kernel(path.parent)
    except NativeUnavailable as error:
        pytest.skip(str(error))
    return path.parent


def model_of(name: str, seed: int = 0) -> Any:
    """A random model whose biases and norms are not neutral."""
    if name not in CONFIGS:
        return tiny_model(name, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


class Native:
    """A decoder over a cache full of NaN: whatever it reads without having written it shows."""

    def __init__(self, model: Any, folder: Path, quantization: Quantization = None, num_threads: int = 1) -> None:
        config = model.config
        info = replace(
            LLAMA_INFO,
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=model.model.layers[0].self_attn.head_dim,
        )
        cpu = torch.device("cpu")
        self.cache = KVCache(info, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.float32, device=cpu)
        self.cache.data.fill_(torch.nan)
        weights = decoder_weights(model, MAX_MODEL_LEN)
        assert weights is not None
        self.weights = weights
        self.decoder = NativeDecoder(
            weights, self.cache, quantization=quantization, num_threads=num_threads, cache_dir=folder
        )
        self.model = model
        self._free = list(range(NUM_BLOCKS))
        random.Random(0).shuffle(self._free)

    def table(self, length: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-length // BLOCK_SIZE))]

    def alone(self, inputs: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Logits of every position, in one call of its own."""
        table = self.table(len(inputs))
        logits = self.decoder([Span(table, 0, len(inputs), inputs, len(inputs))])
        self._free += table
        return logits


def tokens(rng: random.Random, length: int, vocab_size: int = 107) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(length)]


@torch.inference_mode()
def expected(model: Any, inputs: Sequence[int] | torch.Tensor) -> Any:
    if isinstance(inputs, torch.Tensor):
        return model(inputs_embeds=inputs[None], use_cache=True)
    return model(input_ids=torch.tensor([inputs]), use_cache=True)


# ---- Against transformers ----


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 23, 24, 25, 60, 150])
def test_logits_and_cache_are_those_of_transformers(name: str, length: int, kernel_dir: Path) -> None:
    model = model_of(name)
    native = Native(model, kernel_dir)
    inputs = tokens(random.Random(length), length)
    table = native.table(length)
    logits = native.decoder([Span(table, 0, length, inputs, length)])
    reference = expected(model, inputs)
    torch.testing.assert_close(logits, reference.logits[0], atol=1e-3, rtol=0)
    slots = native.cache.slots(table, 0, length)
    for i, layer in enumerate(reference.past_key_values.layers):
        visible = layer.keys.shape[2]  # a sliding layer of transformers keeps the window only
        torch.testing.assert_close(
            native.cache.data[i, :, slots[-visible:]],
            torch.stack([layer.keys[0], layer.values[0]]).transpose(1, 2),
            atol=1e-3,
            rtol=0,
        )


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_and_token_ids_mix(name: str, kernel_dir: Path) -> None:
    model = model_of(name)
    native = Native(model, kernel_dir)
    prompt = torch.randn(9, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    text = tokens(random.Random(2), 30)
    whole = torch.cat([prompt, model.model.embed_tokens(torch.tensor(text))])
    reference = expected(model, whole).logits[0]
    first, other = native.table(39), native.table(30)
    logits = native.decoder([Span(first, 0, 9, prompt, 1), Span(other, 0, 30, torch.tensor(text), 2)])
    torch.testing.assert_close(logits[0], reference[8], atol=1e-3, rtol=0)
    torch.testing.assert_close(logits[1:], expected(model, text).logits[0, -2:], atol=1e-3, rtol=0)
    logits = native.decoder([Span(first, 9, 39, text, 30)])
    torch.testing.assert_close(logits, reference[9:], atol=1e-3, rtol=0)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_deep_model(quantization: Quantization, kernel_dir: Path) -> None:
    config = LlamaConfig(**COMMON | {"num_hidden_layers": 80, "initializer_range": 0.1})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    native = Native(model, kernel_dir, quantization, 2)
    text = tokens(random.Random(9), 30)
    reference = expected(model if quantization is None else dequantized(model), text).logits[0].float()
    found = native.alone(text)
    assert (found - reference).abs().max() < (1e-3 if quantization is None else 2e-2) * reference.abs().max()


def test_the_callers_float_mode_is_kept(kernel_dir: Path) -> None:
    """The kernel's own flushes tiny numbers to 0."""
    native = Native(model_of("llama"), kernel_dir)
    tiny = float("1e-310")
    before = native.alone([1, 2, 3])
    assert tiny / 2 > 0
    torch.set_flush_denormal(True)
    try:
        assert torch.equal(native.alone([1, 2, 3]), before)
        assert not tiny / 2 > 0
    finally:
        torch.set_flush_denormal(False)
    with pytest.raises(ValueError):
        native.decoder([Span([0], 0, 1, [999], 1)])
    assert tiny / 2 > 0


# ---- The same bits in any company ----


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_the_same_bits_in_any_batch_and_any_chunks(
    name: str, num_threads: int, quantization: Quantization, kernel_dir: Path
) -> None:
    model = model_of(name)
    native = Native(model, kernel_dir, quantization, num_threads)
    alone = Native(model, kernel_dir, quantization, 1)
    rng = random.Random(3)
    for _ in range(6):
        rows = []
        for _ in range(rng.choice([1, 2, 5, 13])):
            text = tokens(rng, rng.choice([1, 2, 6, 17, 40]))
            rows.append((text, native.table(len(text)), alone.alone(text)))
        done = [0] * len(rows)
        while any(count < len(text) for count, (text, _, _) in zip(done, rows, strict=True)):
            spans, wanted = [], []
            for i, (text, table, reference) in enumerate(rows):
                if done[i] == len(text) or rng.random() < 0.2:
                    continue
                start, end = done[i], rng.randint(done[i] + 1, len(text))
                num_logits = rng.choice([0, 1, end - start])
                spans.append(Span(table, start, end, text[start:end], num_logits))
                wanted.append(reference[end - num_logits : end])
                done[i] = end
            rng.shuffle(order := list(range(len(spans))))
            logits = native.decoder([spans[i] for i in order])
            assert torch.equal(logits, torch.cat([wanted[i] for i in order] or [logits]))
        for _, table, _ in rows:
            native._free += table


@pytest.mark.parametrize("num_threads", [1, 2])
def test_more_work_than_there_are_chunk_numbers(num_threads: int, kernel_dir: Path) -> None:
    """16 bits count the chunks of a phase, so with so many rows a chunk of attention gets larger, and begins and ends
    between the heads of a row."""
    native = Native(model_of("llama"), kernel_dir, None, num_threads)
    a, b = native.alone([5]), native.alone([7])
    assert not torch.equal(a, b)
    # All rows write the same to one of two slots.
    logits = native.decoder([Span([0], 0, 1, [5], 1), Span([1], 0, 1, [7], 1)] * 33_000)
    assert torch.equal(logits[0::2], a.expand(33_000, -1)) and torch.equal(logits[1::2], b.expand(33_000, -1))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_poisoned_row_poisons_itself_only(
    name: str, quantization: Quantization, poison: float, kernel_dir: Path
) -> None:
    model = model_of(name)
    native = Native(model, kernel_dir, quantization, 2)
    text = tokens(random.Random(4), 20)
    reference = native.alone(text)
    embeddings = model.model.embed_tokens(torch.tensor(text)).clone()
    embeddings[3, 5] = poison
    bad, good, last = native.table(20), native.table(20), native.table(20)
    for _ in range(2):  # a second time: scratch memory must not remember
        logits = native.decoder(
            [Span(good, 0, 20, text, 20), Span(bad, 0, 20, embeddings, 20), Span(last, 0, 20, text, 20)]
        )
        assert torch.equal(logits[:20], reference) and torch.equal(logits[40:], reference)
        assert torch.equal(logits[20:23], reference[:3])
        if poison != 3e38:  # which is finite, and may stay so
            assert not torch.isfinite(logits[23:40]).all(dim=1).any()
    # Decode, behind a past that is poisoned.
    native.cache.data[:, :, native.cache.slots(bad, 2, 3)] = poison
    logits = native.decoder([Span(t, 19, 20, text[19:], 1) for t in (good, bad, last)])
    assert torch.equal(logits[0], reference[19]) and torch.equal(logits[2], reference[19])
    assert not torch.isfinite(logits[1]).any()


@pytest.mark.parametrize("num_logits", [1, 20])
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_a_poisoned_row_is_left_for_the_next_one(
    name: str, quantization: Quantization, num_logits: int, kernel_dir: Path
) -> None:
    """Healthy rows at every place in the batch where poisoned ones were, or where the last layer moved those."""
    model = model_of(name)
    native = Native(model, kernel_dir, quantization)
    text = tokens(random.Random(7), 20)
    reference = native.alone(text)
    embeddings = torch.full((20, model.config.hidden_size), torch.nan)
    bad, good, last = native.table(20), native.table(20), native.table(20)
    healthy = [Span(good, 0, 20, text, num_logits), Span(last, 0, 20, text, num_logits)]
    # Rows that want few logits stand behind the bad ones: the last layer moves them up, into bad rows' places.
    logits = native.decoder([Span(bad, 0, 20, embeddings, 0), *healthy])
    assert torch.equal(logits, torch.cat([reference[-num_logits:]] * 2))
    native.decoder([Span(bad, 0, 20, embeddings, 20), Span(good, 0, 20, embeddings, 20)])
    for spans in (healthy, healthy[::-1]):
        assert torch.equal(native.decoder(spans), torch.cat([reference[-num_logits:]] * 2))
    native.decoder([Span(bad, 0, 20, embeddings, 20), Span(good, 0, 20, embeddings, 20)])
    logits = native.decoder([Span(good, 0, 20, text, 1), Span(last, 0, 19, text[:19], 0)])
    assert torch.equal(logits, reference[-1:])


# ---- int8 ----


def dequantized(model: Any) -> Any:
    """The model in float64 with the weights that int8 leaves: per output, steps of max / 127."""
    copy = deepcopy(model).double()
    linears = [module for module in copy.modules() if isinstance(module, torch.nn.Linear)]
    for linear in linears:
        weight = linear.weight.detach().float()
        step = (weight.abs().amax(1, keepdim=True) / 127).double()
        linear.weight = torch.nn.Parameter((weight.double() / step).round() * step, requires_grad=False)  # unties
    return copy


@pytest.mark.parametrize("name", MODELS)
def test_int8_loses_only_what_the_weights_lose(name: str, kernel_dir: Path) -> None:
    model = model_of(name)
    native = Native(model, kernel_dir, "int8")
    text = tokens(random.Random(5), 50)
    reference = expected(dequantized(model), text).logits[0]
    error = (native.alone(text).double() - reference).abs().max() / reference.abs().max()
    assert error < 1e-3  # activations keep 13 bits and more


@pytest.mark.parametrize("inputs", [4090, 4096, 4098, 8192, 14336, 14400])
def test_int8_keeps_its_accuracy_with_many_inputs(inputs: int, kernel_dir: Path) -> None:
    """As in a Llama of 8 B. Only the MLP is in the logits, and only its second product has many inputs."""
    config = LlamaConfig(**COMMON | {"intermediate_size": inputs, "num_hidden_layers": 1}, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    model.model.layers[0].self_attn.o_proj.weight.mul_(1e-6)
    native = Native(model, kernel_dir, "int8", 2)
    text = tokens(random.Random(8), 11)
    reference = expected(dequantized(model), text).logits[0]
    found = native.alone(text)
    error = (found.double() - reference).square().mean().sqrt() / reference.square().mean().sqrt()
    assert error < 1.2e-3  # with one 32-bit sum for all it was 3e-3 at 14336
    for i in range(11):  # in any company, across what is summed apart
        assert torch.equal(native.alone(text[: i + 1])[-1], found[i])


@pytest.mark.parametrize("inputs", [4096, 8192, 14336])
def test_int8_sums_fit_at_the_extremes(inputs: int, kernel_dir: Path) -> None:
    """All weights and activations at their largest, the most inputs: a wrapped sum would change its sign."""
    config = LlamaConfig(**COMMON | {"intermediate_size": inputs, "num_hidden_layers": 1}, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    mlp = model.model.layers[0].mlp
    model.model.layers[0].self_attn.o_proj.weight.mul_(1e-6)  # or it could make the gates negative
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        linear.weight.fill_(1.0)
    model.model.embed_tokens.weight.fill_(1.0)
    native = Native(model, kernel_dir, "int8")
    reference = expected(dequantized(model), [1, 2, 3]).logits[0].float()
    torch.testing.assert_close(native.alone([1, 2, 3]), reference, atol=1e-3, rtol=0)


# ---- float32 weights in fewer bytes ----

# Two panels at once, and one that is left over: 63 of them, in chunks of 7 or 3. 72 and 300 inputs: 32s and a rest.
WIDE = LlamaConfig(
    **COMMON
    | {"hidden_size": 72, "intermediate_size": 300, "vocab_size": 1000, "num_hidden_layers": 2, "head_dim": 24}
    | {"num_attention_heads": 3, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    tie_word_embeddings=False,
)
HELD = {Storage.BLOCKS: "8-bit blocks", Storage.BFLOAT16: "bfloat16", Storage.FLOAT32: "float32"}


def in_blocks(matrix: torch.Tensor, levels: int = 15) -> torch.Tensor:
    """What GGUF leaves of it, per 32 inputs: code * scale + minimum (Q4_1), or with 127 levels code * scale (Q8_0)."""
    groups = []
    for group in matrix.split(32, dim=1):
        low, high = group.aminmax(dim=1, keepdim=True)
        if levels == 127:
            low, high = torch.zeros_like(low), torch.maximum(high, -low)
        scale = ((high - low) / levels).half().float()
        codes = ((group - low) / scale).round().clamp(-levels if levels == 127 else 0, levels)
        groups.append(codes * scale + low.half().float())
    return torch.cat(groups, dim=1)


def rounded(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.bfloat16().float()


def held_in_less(name: str, how: str) -> tuple[Any, set[Storage]]:
    """A model of such weights, and how they will be held. Mixed: attention, MLP and head differ."""
    model = model_of(name) if name != "wide" else AutoModelForCausalLM.from_config(WIDE, dtype=torch.float32).eval()
    model.requires_grad_(False)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            kind = how if how != "mixed" else "blocks" if "attn" in path else "bfloat16" if "mlp" in path else "float32"
            if kind == "blocks":
                module.weight.copy_(in_blocks(module.weight, 127 if "lm_head" in path or "down" in path else 15))
            elif kind == "bfloat16":
                module.weight.copy_(rounded(module.weight))
    return model, set(HELD) if how == "mixed" else {Storage[how.upper()]}


@pytest.mark.parametrize("how", ["blocks", "bfloat16", "float32", "mixed"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "odd", "wide"])
def test_weights_held_in_fewer_bytes_give_the_same_bits(
    name: str, how: str, kernel_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, storages = held_in_less(name, how)
    decoders = [Native(model, kernel_dir, None, num_threads) for num_threads in (1, 2, 3)]
    monkeypatch.setattr(native_panels, "EXACT", (Storage.FLOAT32,))
    plain = Native(model, kernel_dir)
    assert plain.decoder.describe == "native Llama-family decoder in float32, threads: 1"
    names = [name for storage, name in HELD.items() if storage in storages]
    held = "" if names == ["float32"] else f" (weights held in {' and '.join(names)}, exact)"
    assert decoders[1].decoder.describe == f"native Llama-family decoder in float32{held}, threads: 2"
    row = 4 * model.config.hidden_size
    share = {"blocks": (9 / 32, 0.36), "bfloat16": (0.5, 0.5), "float32": (1, 1), "mixed": (0.35, 0.9)}[how]
    sizes = [native.decoder.weight_bytes - row for native in (decoders[0], plain)]
    assert share[0] <= sizes[0] / sizes[1] <= share[1] + 0.01
    rng = random.Random(11)
    for count in (1, 1, 2, 3, 4, 5, 6, 7, 13, 20, *[150] * 10):  # so many rows keep all threads busy at once
        lengths = [rng.choice([1, 1, 1, 4]) if count > 1 else 1 for _ in range(count)]
        texts = [tokens(rng, length) for length in lengths]
        tables = [plain.table(length) for length in lengths]
        spans = [Span(t, 0, len(text), text, len(text)) for t, text in zip(tables, texts, strict=True)]
        reference = plain.decoder(spans)
        assert torch.isfinite(reference).all()
        for native in decoders:
            assert torch.equal(native.decoder(spans), reference)
        plain._free += [block for table in tables for block in table]


def held(kernel_dir: Path, matrix: torch.Tensor) -> Storage:
    """How a matrix is held; that every bit of it is, and zeros behind it, by another reading of the format."""
    kernel = Native(tiny_model("llama"), kernel_dir).decoder._kernel
    packed = Packer(kernel, [(len(matrix), matrix.shape[1])], quantized=False).stack([matrix], [None])
    count, parts = matrix.shape[1], []
    size, panels = kernel.softprompt_panel_bytes(packed.storage, count), len(packed.bias) // 16
    for panel in packed.weights[: size * panels].split(size):
        if packed.storage is Storage.FLOAT32:
            parts.append(panel.view(torch.float32).view(count, 16))
        elif packed.storage is Storage.BFLOAT16:
            parts.append((panel.view(torch.int16).view(count, 16).int() << 16).view(torch.float32))
        else:
            groups = []
            for group in panel.split(64 + 32 * 16):
                scale, minimum = group[:64].view(torch.float16).float().view(2, 16)
                groups.append(group[64:].view(torch.int8).view(-1, 16).float() * scale + minimum)
            parts.append(torch.cat(groups))
    found = torch.cat(parts, dim=1).T.contiguous().view(torch.int32)
    assert torch.equal(found[: len(matrix)], matrix.view(torch.int32)) and not found[len(matrix) :].any()
    return packed.storage


def random_matrix(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(12)) / 8


def some(value: float, matrix: torch.Tensor, where: tuple[int, int] = (3, 40)) -> torch.Tensor:
    matrix = matrix.clone()
    matrix[where] = value
    return matrix


SHAPES = [(16, 32), (32, 64), (21, 100), (5, 31), (48, 33), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_how_weights_are_held(shape: tuple[int, int], kernel_dir: Path) -> None:
    matrix = random_matrix(*shape)
    for levels in (15, 127, 31):
        assert held(kernel_dir, in_blocks(matrix, levels)) is Storage.BLOCKS
    # Few bits on a grid of its own: some groups may be blocks of another kind, too.
    assert held(kernel_dir, rounded(matrix)) in ((Storage.BFLOAT16,) if min(shape) > 1 else (Storage.BLOCKS,))
    if min(shape) > 1:
        assert held(kernel_dir, matrix) is Storage.FLOAT32


@pytest.mark.parametrize("where", [(0, 0), (3, 31), (3, 32), (20, 99), (20, 95), (20, 96)])
@pytest.mark.parametrize("make", [in_blocks, rounded])
def test_one_weight_that_does_not_fit_is_enough(make: Any, where: tuple[int, int], kernel_dir: Path) -> None:
    """It is off in its last bit."""
    matrix = make(random_matrix(21, 100))
    matrix.view(torch.int32)[where] ^= 1
    assert held(kernel_dir, matrix) is Storage.FLOAT32


def test_unusual_weights_keep_their_bits(kernel_dir: Path) -> None:
    blocks, halves = in_blocks(random_matrix(21, 100)), rounded(random_matrix(21, 100))
    grid = in_blocks(random_matrix(21, 100), 127)
    grid[grid == 0] = -0.0  # as Q4_0 has them, where a scale is negative
    assert torch.signbit(grid[grid == 0]).any() and held(kernel_dir, grid) is Storage.BLOCKS
    for zero in (0.0, -0.0):
        assert held(kernel_dir, torch.full((21, 100), zero)) is Storage.BLOCKS
    both = some(0.0, some(-0.0, torch.zeros(21, 100)), (3, 41))
    assert held(kernel_dir, both) is Storage.BFLOAT16
    assert held(kernel_dir, torch.full((21, 100), 0.375)) is Storage.BLOCKS
    assert held(kernel_dir, some(-0.0, blocks)) is Storage.FLOAT32
    for value in (-0.0, torch.inf, -torch.inf, torch.nan, 2.0**-130, 2.0**100, -(2.0**-60)):
        assert held(kernel_dir, some(value, halves)) is Storage.BFLOAT16
        assert held(kernel_dir, some(value, random_matrix(21, 100))) is Storage.FLOAT32
    # Scales that float16 does not have: too small, too large. What it has with fewer bits is exact, too.
    for factor in (2.0**-30, 2.0**30):
        assert held(kernel_dir, blocks * factor) is Storage.FLOAT32
    for scale in (2.0**-24, 3 * 2.0**-24, 2047 * 2.0**-20, 65504.0):
        codes = torch.randint(-127, 128, (21, 100), generator=torch.Generator().manual_seed(13))
        codes[:, ::32] = 127
        assert held(kernel_dir, codes * scale) is Storage.BLOCKS


def test_tiny_scales_and_odd_weights_compute_alike(kernel_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 has subnormals where the kernel flushes those of float; an infinite weight makes NaN, as ever."""
    model, _ = held_in_less("wide", "blocks")
    layers = model.model.layers
    codes = torch.randint(-127, 128, (72, 300), generator=torch.Generator().manual_seed(13))
    codes[:, ::32] = 127
    layers[0].mlp.down_proj.weight.copy_(codes * 3 * 2.0**-24)
    layers[1].self_attn.o_proj.weight.copy_(some(-0.0, rounded(layers[1].self_attn.o_proj.weight)))
    layers[1].mlp.up_proj.weight.copy_(rounded(rounded(layers[1].mlp.up_proj.weight) * 2.0**-125))
    layers[1].mlp.gate_proj.weight.copy_(rounded(layers[1].mlp.gate_proj.weight))
    model.lm_head.weight.copy_(some(torch.inf, rounded(model.lm_head.weight)))
    native = Native(model, kernel_dir)
    monkeypatch.setattr(native_panels, "EXACT", (Storage.FLOAT32,))
    plain = Native(model, kernel_dir)
    assert native.decoder._storages == {Storage.BLOCKS, Storage.BFLOAT16}
    for text in ([5], [5, 6, 7], list(range(20))):
        bits = [decoder.alone(text).view(torch.int32) for decoder in (native, plain)]
        assert torch.equal(*bits)


# ---- What it refuses ----


def test_wrong_spans_are_refused_before_anything_is_written(kernel_dir: Path) -> None:
    native = Native(model_of("llama"), kernel_dir)
    ok = Span([0, 1], 0, 5, [1] * 5, 1)
    for wrong in (
        replace(ok, inputs=[1, 2, 3, 4, 128]),
        replace(ok, inputs=[1, 2, 3, 4, -1]),
        replace(ok, inputs=[1, 2, 3]),
        replace(ok, inputs=torch.zeros(5, 31)),
        replace(ok, block_table=[0]),
        replace(ok, block_table=[0, NUM_BLOCKS]),
        replace(ok, block_table=[0, -1]),
        replace(ok, num_logits=6),
        replace(ok, num_logits=-1),
        replace(ok, start=5, inputs=[]),
        Span(list(range(129)), MAX_MODEL_LEN - 1, MAX_MODEL_LEN + 1, [1, 2], 1),
    ):
        with pytest.raises(ValueError):
            native.decoder([ok, wrong])
    assert native.cache.data.isnan().all()
    assert native.decoder([]).shape == (0, 128)
    native.decoder.close()
    native.decoder.close()
    with pytest.raises(RuntimeError):
        native.decoder([ok])


EXIT_SCRIPT = """
import sys, threading, time
from pathlib import Path
from app.engine.forward import Span
from tests.test_native_decoder import Native, model_of

native = Native(model_of("llama"), Path(sys.argv[1]), num_threads=2)
tables = [native.table(64) for _ in range(8)]
spans = [Span(table, 0, 64, list(range(64)), 1) for table in tables] * 4000
entered = threading.Event()
step = native.decoder._kernel.softprompt_step

class Kernel:
    # Says when the step is in the kernel: in an operation of torch's own it would end the process with an error.
    def softprompt_step(self, *arguments):
        entered.set()
        return step(*arguments)

native.decoder._kernel = Kernel()
thread = threading.Thread(target=native.decoder, args=(spans,), daemon=True)
thread.start()
entered.wait()
time.sleep(0.05)
print(thread.is_alive())
"""


def test_the_process_may_end_in_the_middle_of_a_step(kernel_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXIT_SCRIPT, str(kernel_dir)],
        cwd=Path(build.__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n", "the step ended before the process"


def test_close_waits_for_a_running_step(kernel_dir: Path) -> None:
    native = Native(model_of("llama"), kernel_dir, num_threads=2)
    tables = [native.table(64) for _ in range(8)]
    spans = [Span(table, 0, 64, list(range(64)), 64) for table in tables]
    reference = native.decoder(spans)
    started, found = threading.Event(), []

    def loop() -> None:
        try:
            while True:
                found.append(native.decoder(spans))
                started.set()
        except RuntimeError as error:
            found.append(error)

    threads = [threading.Thread(target=loop) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert started.wait(60)
    native.decoder.close()
    for thread in threads:
        thread.join(60)
    assert sum(isinstance(result, RuntimeError) for result in found) == 2
    assert all(torch.equal(result, reference) for result in found if isinstance(result, torch.Tensor))


def test_unsupported_models_are_refused(kernel_dir: Path) -> None:
    native = Native(model_of("llama"), kernel_dir)
    with pytest.raises(ValueError, match="float32"):
        NativeDecoder(replace(native.weights, lm_head=native.weights.lm_head.half()), native.cache)
    with pytest.raises(ValueError, match="float32"):
        NativeDecoder(replace(native.weights, norm=native.weights.norm.double()), native.cache)
    with pytest.raises(ValueError, match="multiple of 8"):
        NativeDecoder(replace(native.weights, head_dim=12), native.cache)
    with pytest.raises(ValueError, match="num_threads"):
        NativeDecoder(native.weights, native.cache, num_threads=0)


MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
VECTORS = ("input_norm", "mlp_norm", "q_norm", "k_norm", *(f"{name}_bias" for name in MATRICES))


@pytest.mark.parametrize("name", ["embedding", "lm_head", "lm_head_bias", "norm", "cos", "sin", *MATRICES, *VECTORS])
def test_tensors_of_another_size_are_refused(name: str, kernel_dir: Path) -> None:
    """The kernel would read or write behind them."""
    native = Native(model_of("qwen3"), kernel_dir)
    weights = native.weights
    if hasattr(weights, name):
        old = getattr(weights, name)
        short = torch.zeros(64) if old is None else old[:, :-1] if name in ("cos", "sin") else old[:-1]
        wrong = replace(weights, **{name: short.contiguous()})
    else:
        old = getattr(weights.layers[1], name)
        layer = replace(weights.layers[1], **{name: torch.zeros(7) if old is None else old[:-1]})
        wrong = replace(weights, layers=(weights.layers[0], layer, *weights.layers[2:]))
    with pytest.raises(ValueError, match="do not fit each other"):
        NativeDecoder(wrong, native.cache, cache_dir=kernel_dir)
    if name in MATRICES:
        layer = replace(weights.layers[1], **{name: old[:, :-1].contiguous()})
        wrong = replace(weights, layers=(*weights.layers[:1], layer, *weights.layers[2:]))
        with pytest.raises(ValueError, match="do not fit each other"):
            NativeDecoder(wrong, native.cache, cache_dir=kernel_dir)


def test_a_cache_of_another_size_is_refused(kernel_dir: Path) -> None:
    native = Native(model_of("llama"), kernel_dir)
    data = native.cache.data
    for wrong in (data[:2], data[:, :1], data[:, :, :-1], data[:, :, :, :1], data[..., :4], data[0]):
        native.cache.data = wrong.clone()
        with pytest.raises(ValueError, match="does not fit"):
            NativeDecoder(native.weights, native.cache, cache_dir=kernel_dir)
    with pytest.raises(ValueError, match="layers"):
        NativeDecoder(replace(native.weights, layers=()), native.cache, cache_dir=kernel_dir)
