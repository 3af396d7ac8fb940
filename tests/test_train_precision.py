"""Products in bfloat16 where the processor has it: what that changes, and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.text import Template
from app.train import Row, TrainReport, forward
from app.train import precision as precision_module
from app.train.data import Example, encode
from app.train.forward import Batch, answer_nll, can_share
from app.train.precision import cpu_has_bfloat16, product_dtype
from app.train.recipe import Recipe
from app.train.trainer import train
from tests.tiny import tiny_model, tiny_tokenizer

TEMPLATE = Template("{input}:")
ROWS = [Row("the weather", "bad"), Row("it is a day", "a"), Row("on and on and on", "it"), Row("a", "the weather")]


def examples() -> list[Example]:
    return encode(ROWS, tiny_tokenizer(), TEMPLATE, 64)


def has(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True), raising=False)


@pytest.mark.parametrize(
    ("features", "dtype", "precision", "expected"),
    [
        (("avx2", "avx512_f", "avx512_bf16"), torch.float32, "auto", torch.bfloat16),
        (("avx2", "amx_bf16"), torch.float32, "auto", torch.bfloat16),
        (("avx2", "avx512_f"), torch.float32, "auto", torch.float32),  # emulated: a hundred times slower
        (("avx512_bf16",), torch.float32, "float32", torch.float32),
        (("avx512_bf16",), torch.float16, "auto", torch.float16),
        ((), torch.bfloat16, "auto", torch.bfloat16),
    ],
)
def test_bfloat16_is_for_float32_weights_on_a_processor_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
    features: tuple[str, ...],
    dtype: torch.dtype,
    precision: Any,
    expected: torch.dtype,
) -> None:
    has(monkeypatch, *features)
    assert product_dtype(tiny_model("llama").to(dtype), precision) == expected


def test_a_torch_that_cannot_tell_counts_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not cpu_has_bfloat16()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["virtual tokens", "keys and values"])
def test_a_mixed_forward_is_near_that_in_float32_and_so_is_its_gradient(kind: str, shared: bool) -> None:
    model = tiny_model("llama").requires_grad_(False)
    config = model.config
    hidden, heads = config.hidden_size, config.num_key_value_heads
    size = (5, hidden) if kind == "virtual tokens" else (config.num_hidden_layers, 2, heads, 5, config.head_dim)
    start = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.1
    batch = Batch.of(examples(), torch.device("cpu"))
    found = []
    for is_mixed in (False, True):
        prompt = start.clone().requires_grad_()
        losses = answer_nll(model, prompt, batch, shared=shared, is_mixed=is_mixed)
        losses.mean().backward()
        assert prompt.grad is not None and losses.dtype == prompt.grad.dtype == torch.float32
        found.append((losses.detach(), prompt.grad))
    (losses, gradient), (mixed_losses, mixed_gradient) = found
    assert not torch.equal(losses, mixed_losses), "in float32 still"
    assert (mixed_losses - losses).norm() < 0.03 * losses.norm()
    assert torch.cosine_similarity(mixed_gradient.flatten(), gradient.flatten(), dim=0) > 0.98


@pytest.mark.parametrize(
    ("is_mixed", "spare", "expected"), [(True, 0, "eager"), (True, -1, "sdpa"), (False, 0, "sdpa")]
)
def test_attention_is_plain_for_short_rows_in_mixed_precision(
    monkeypatch: pytest.MonkeyPatch, is_mixed: bool, spare: int, expected: str
) -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.set_attn_implementation("sdpa")
    seen = []
    model.get_decoder().register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    batch, prompt = Batch.of(examples(), torch.device("cpu")), torch.zeros(5, model.config.hidden_size)
    monkeypatch.setattr(forward, "_PLAIN_ATTENTION", 5 + batch.ids.shape[1] + spare)
    answer_nll(model, prompt, batch, shared=True, is_mixed=is_mixed)
    assert set(seen) == {expected} and model.config._attn_implementation == "sdpa"


def test_the_attention_of_a_model_is_its_own_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").requires_grad_(False)
    monkeypatch.setattr(model, "get_decoder", lambda: 1 / 0)
    batch, prompt = Batch.of(examples(), torch.device("cpu")), torch.zeros(5, model.config.hidden_size)
    with pytest.raises(ZeroDivisionError):
        answer_nll(model, prompt, batch, shared=True, is_mixed=True)
    assert model.config._attn_implementation == "sdpa"


def test_the_last_token_of_a_row_is_no_input() -> None:
    rows = examples()
    batch = Batch.of(rows, torch.device("cpu"))
    assert batch.ids.shape == batch.mask.shape == (len(rows), max(len(e.ids) for e in rows) - 1)
    assert batch.mask.sum(dim=1).tolist() == [len(e.ids) - 1 for e in rows]
    assert [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch.ids, batch.mask, strict=True)] == [
        e.ids[:-1] for e in rows
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_prompt_is_shared_whatever_the_weights_are_kept_in(dtype: torch.dtype) -> None:
    model = tiny_model("llama").requires_grad_(False).to(dtype)
    prompt = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    assert can_share(model, prompt, examples())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_head_is_not_alone_with_is_seen_in_halves_too(dtype: torch.dtype) -> None:
    model = tiny_model("gemma2").requires_grad_(False).to(dtype)
    prompt = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    kept, model.config.final_logit_softcapping = model.config.final_logit_softcapping, None
    assert kept and can_share(model, prompt, examples())
    with torch.no_grad():
        most = model(input_ids=torch.tensor([examples()[0].ids])).logits.abs().max().item()
    model.config.final_logit_softcapping = 3 * most  # which moves the greatest logit by 4 %
    assert not can_share(model, prompt, examples())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_position_is_seen_in_halves_too(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model = tiny_model("llama").requires_grad_(False).to(dtype)
    prompt = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    behind = forward._behind

    def off(cache: Any, prompt: torch.Tensor, batch: Batch) -> dict[str, Any]:
        found = behind(cache, prompt, batch)
        return found | {"position_ids": found["position_ids"] - prompt.shape[-2]}

    monkeypatch.setattr(forward, "_behind", off)
    assert not can_share(model, prompt, examples())


def run(folder: Path, steps: int = 4, **changes: Any) -> TrainReport:
    recipe = Recipe(num_virtual_tokens=5, batch_size=2, max_steps=steps, warmup_steps=0, eval_every=2, **changes)
    return train(tiny_model("llama"), tiny_tokenizer(), ROWS, ROWS, TEMPLATE, recipe, folder, base_name="tiny/llama")


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "cartridge"])
def test_what_is_trained_stays_in_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str) -> None:
    found = {}
    for name in ("avx512_bf16", "none"):
        has(monkeypatch, name)
        found[name] = run(tmp_path / name, method=method)
        [tensor, *_] = load_file(tmp_path / name / "adapter_model.safetensors").values()
        assert tensor.dtype == torch.float32 and not torch.equal(tensor, tensor.bfloat16().float())
    mixed, plain = found["avx512_bf16"], found["none"]
    assert (mixed.precision, plain.precision) == ("bfloat16", "float32")
    assert mixed.best_validation_loss != plain.best_validation_loss
    # Adam makes much of little in its first steps
    assert mixed.best_validation_loss == pytest.approx(plain.best_validation_loss, rel=0.1)


def test_a_run_of_another_precision_is_not_taken_for_this_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    has(monkeypatch)
    assert run(tmp_path).precision == "float32"
    monkeypatch.setattr(precision_module, "cpu_has_bfloat16", lambda: True)
    assert run(tmp_path).precision == "bfloat16"
    assert run(tmp_path, precision="float32").precision == "float32"
