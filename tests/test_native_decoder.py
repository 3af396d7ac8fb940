"""The native decoder against transformers' own forward, against itself in other company, and its build cache."""

from __future__ import annotations

import random
import subprocess
import sys
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
from app.engine.native.build import NativeUnavailable
from app.engine.native.decoder import NativeDecoder
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


@pytest.fixture(scope="module", autouse=True)
def kernel_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module's kernel is built. Skips where it cannot be."""
    folder = tmp_path_factory.mktemp("kernel")
    try:
        build.load_kernel(folder)
    except NativeUnavailable as error:
        pytest.skip(str(error))
    return folder


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
            tiny_info(tiny_model("llama")),
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
        assert not torch.isfinite(logits[23:40]).all(dim=1).any() or poison == 3e38
    # Decode, behind a past that is poisoned.
    native.cache.data[:, :, native.cache.slots(bad, 2, 3)] = poison
    logits = native.decoder([Span(t, 19, 20, text[19:], 1) for t in (good, bad, last)])
    assert torch.equal(logits[0], reference[19]) and torch.equal(logits[2], reference[19])
    assert not torch.isfinite(logits[1]).any()


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


def test_int8_sums_fit_at_the_extremes(kernel_dir: Path) -> None:
    """All weights and activations at their largest, the most inputs: a wrapped sum would change its sign."""
    config = LlamaConfig(**COMMON | {"intermediate_size": 8192, "num_hidden_layers": 1}, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    mlp = model.model.layers[0].mlp
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        linear.weight.fill_(1.0)
    model.model.embed_tokens.weight.fill_(1.0)
    native = Native(model, kernel_dir, "int8")
    reference = expected(dequantized(model), [1, 2, 3]).logits[0].float()
    torch.testing.assert_close(native.alone([1, 2, 3]), reference, atol=1e-3, rtol=0)


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


def test_unsupported_models_are_refused(kernel_dir: Path) -> None:
    native = Native(model_of("llama"), kernel_dir)
    with pytest.raises(ValueError, match="float32"):
        NativeDecoder(replace(native.weights, lm_head=native.weights.lm_head.half()), native.cache)
    with pytest.raises(ValueError, match="multiple of 8"):
        NativeDecoder(replace(native.weights, head_dim=12), native.cache)
    with pytest.raises(ValueError, match="num_threads"):
        NativeDecoder(native.weights, native.cache, num_threads=0)


# ---- The build cache ----


def test_a_kernel_is_built_once_and_a_damaged_one_again(tmp_path: Path) -> None:
    path = build.build(tmp_path)
    written = path.stat().st_mtime_ns
    assert build.build(tmp_path) == path and path.stat().st_mtime_ns == written
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:5000] + b"\xff" + whole[5001:], b""):
        path.write_bytes(damaged)
        assert build.build(tmp_path) == path
        assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_two_processes_build_at_once(tmp_path: Path) -> None:
    script = (
        f"from pathlib import Path; from app.engine.native import build; build.load_kernel(Path({str(tmp_path)!r}))"
    )
    running = [subprocess.Popen([sys.executable, "-c", script], cwd=Path(build.__file__).parents[3]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false", ""])
def test_without_a_compiler_it_is_unavailable(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailable):
        build.build(tmp_path / "kernels")


def test_a_compiler_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "cc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit 0\necho no such target >&2; exit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with pytest.raises(NativeUnavailable, match="no such target"):
        build.build(tmp_path / "kernels")


def test_a_prebuilt_kernel_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt = tmp_path / "prebuilt.so"
    monkeypatch.setattr(build, "_prebuilt_path", lambda: prebuilt)
    build.main()
    monkeypatch.setenv("CC", "/nowhere/cc")
    build.load_kernel(tmp_path / "kernels")
    prebuilt.write_bytes(prebuilt.read_bytes()[:-1])
    with pytest.raises(NativeUnavailable):
        build.load_kernel(tmp_path / "kernels")


def test_a_cpu_without_avx2_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = Path.read_text

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        return "flags : sse2 avx" if str(self) == "/proc/cpuinfo" else original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(NativeUnavailable, match="no avx2 and no fma"):
        build.load_kernel(tmp_path)
