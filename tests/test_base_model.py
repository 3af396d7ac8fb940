"""Loading, freezing and fingerprinting: what may be served, and what makes two models the same one."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from app import base_model
from app.base_model import BaseModel, describe, load_base_model, pick_device, pick_dtype
from app.errors import InvalidBaseModel
from tests.tiny import ARCHITECTURES, save_tiny, tiny_base, tiny_info, tiny_model, tiny_tokenizer

KNOWN_FINGERPRINT = "sha256:c639831881ad20a31edd96e91d1992d326ba7f4103eac9d2ee43ad2371940419"


def load(folder: Path, **options: Any) -> BaseModel:
    options.setdefault("cache_dir", folder.parent / "cache")
    return load_base_model(str(folder), device="cpu", **options)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes), encoding="utf-8")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_from_a_folder(architecture: str) -> None:
    base, model = tiny_base(architecture), tiny_model(architecture)
    assert base.info == dataclasses.replace(tiny_info(model), fingerprint=base.info.fingerprint)
    assert (base.device.type, base.dtype, base.eos_token_ids) == ("cpu", torch.float32, {0})
    ids = torch.arange(2, 62).unsqueeze(0)  # longer than a window
    torch.testing.assert_close(base.model(ids).logits, model(ids).logits, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frozen(architecture: str) -> None:
    model = tiny_base(architecture).model
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == []
    assert not any(module.training for module in model.modules())


def test_a_cap_on_attention_scores_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = {name: tiny_base(name).model.config._attn_implementation for name in ARCHITECTURES}
    assert attention == dict.fromkeys(ARCHITECTURES, "sdpa") | {"gemma2": "eager"}
    monkeypatch.setattr("transformers.Gemma2ForCausalLM._supports_sdpa", True)  # as transformers 5.16 has it
    assert load(save_tiny(tmp_path / "m", "gemma2")).model.config._attn_implementation == "eager"


@pytest.mark.parametrize(("asked", "given"), [(None, 512), (100, 100), (9999, 512)])
def test_max_model_len_only_lowers(tmp_path: Path, asked: int | None, given: int) -> None:
    folder = save_tiny(tmp_path / "m", "gpt2")
    assert load(folder, max_model_len=asked).info.max_model_len == given


def test_all_ids_that_end_an_answer(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    edit(folder / "config.json", eos_token_id=[4, 5])
    edit(folder / "generation_config.json", eos_token_id=6)
    assert load(folder).eos_token_ids == {0, 4, 5, 6}


def tiny_bert() -> PreTrainedModel:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertLMHeadModel(BertConfig(vocab_size=128, **size))


def tiny_t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4))


def tiny_vit() -> PreTrainedModel:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTModel(ViTConfig(image_size=8, patch_size=4, **size))


def tiny_mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4))


def tiny_deepseek() -> PreTrainedModel:
    """Keys of 24 and values of 8 a head."""
    config = DeepseekV3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=8,
        max_position_embeddings=64,
    )
    return DeepseekV3ForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (tiny_bert, "BertLMHeadModel does not take embeddings and keep a key/value cache"),
        (tiny_t5, "t5 is an encoder-decoder"),
        (tiny_vit, "vit is not a causal language model"),
        (tiny_mamba, "mamba has linear_attention layers"),
        (tiny_deepseek, "DeepseekV3ForCausalLM keeps keys and values of different shapes"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models_that_cannot_be_served(make: Callable[[], PreTrainedModel], reason: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(InvalidBaseModel, match=reason):
        load(tmp_path / "m")


def test_a_model_that_looks_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    forward = PreTrainedModel.__call__
    assert load(folder).info.num_layers == 3

    def bidirectional(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if "inputs_embeds" in kwargs:
            output.logits = output.logits + output.logits.mean(dim=1, keepdim=True)
        return output

    monkeypatch.setattr("transformers.LlamaForCausalLM.__call__", bidirectional)
    with pytest.raises(InvalidBaseModel, match="LlamaForCausalLM is not causal"):
        load(folder)


def test_layers_that_are_not_attention_are_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    config = Qwen3NextConfig(layer_types=["linear_attention", "full_attention"], num_hidden_layers=2)
    config.save_pretrained(folder)
    with pytest.raises(InvalidBaseModel, match="qwen3_next has linear_attention layers"):
        load(folder)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidBaseModel, match="1 tensors of LlamaForCausalLM missing .*layers.1.mlp.up_proj"):
        load(folder)


def test_weights_of_another_shape(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 31)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidBaseModel, match="1 tensors of LlamaForCausalLM .*misshapen.*layers.1.mlp.up_proj"):
        load(folder)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InvalidBaseModel, match="only safetensors weights are loaded"):
        load(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("model_type", ["llama", "unheard_of"])
def test_code_in_a_model_folder_never_runs(model_type: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n", encoding="utf-8")
    classes = {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M", "AutoTokenizer": ["trap.T", "trap.T"]}
    edit(folder / "config.json", auto_map=classes, model_type=model_type)
    edit(folder / "tokenizer_config.json", auto_map=classes)
    if model_type == "llama":
        assert type(load(folder).model).__name__ == "LlamaForCausalLM"
    else:
        with pytest.raises(InvalidBaseModel):
            load(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b"{", "cannot load the base model"),
        ("config.json", b"[]", "cannot load the base model"),
        ("model.safetensors", None, "no model.safetensors"),
        ("model.safetensors", b"\xff" * 100, "cannot load the base model"),
        ("tokenizer.json", b"{}", "cannot load the base model"),
        ("tokenizer.json", None, "cannot load the base model"),
    ],
)
def test_broken_folders(name: str, content: bytes | None, reason: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(InvalidBaseModel, match=reason):
        load(folder)


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    for device in ("cuda", "cuda:0", "mps", "xpu"):
        with pytest.raises(InvalidBaseModel, match="there is no device"):
            pick_device(device)
    with pytest.raises(InvalidBaseModel, match="is not one of auto"):
        pick_device("gpu")


@pytest.mark.parametrize(
    ("device", "bf16", "dtype", "expected"),
    [
        ("cpu", True, "auto", torch.float32),
        ("cpu", True, "bfloat16", torch.bfloat16),
        ("mps", False, "auto", torch.float16),
        ("cuda", True, "auto", torch.bfloat16),
        ("cuda", False, "auto", torch.float16),
        ("cuda", True, "float32", torch.float32),
    ],
)
def test_dtype_goes_by_the_device(
    monkeypatch: pytest.MonkeyPatch, device: str, bf16: bool, dtype: str, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    assert pick_dtype(dtype, torch.device(device)) is expected


def test_an_unknown_dtype() -> None:
    with pytest.raises(InvalidBaseModel, match="'int3' is not one of auto, float32"):
        pick_dtype("int3", torch.device("cpu"))


def deal_into_two_files(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {}
    for number in (1, 0):
        part = dict(list(reversed(weights.items()))[number::2])
        save_file(part, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
        files |= dict.fromkeys(part, f"model-{number}.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": files})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def test_fingerprint_ignores_what_changes_nothing(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    base = load(folder)
    expected = base.info.fingerprint
    again = tmp_path / "again"
    base.model.save_pretrained(again)
    base.tokenizer.save_pretrained(again)
    deal_into_two_files(again)
    edit(again / "config.json", transformers_version="9.9.9", use_cache=False, _name_or_path="/x", dtype="float16")
    (again / "README.md").write_text("hello", encoding="utf-8")
    assert load(again).info.fingerprint == expected
    assert load(folder, dtype="bfloat16").info.fingerprint == expected
    base.tokenizer.encode("x", truncation=True, max_length=3)
    assert base_model.model_fingerprint(folder, base.model.config, base.tokenizer) == expected


def one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][31, 63] += 1e-6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def swapped_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    one, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    weights[one], weights[other] = weights[other], weights[one]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def rope_theta(folder: Path) -> None:
    edit(folder / "config.json", rope_parameters={"rope_theta": 20000.0, "rope_type": "default"})


def norm_epsilon(folder: Path) -> None:
    edit(folder / "config.json", rms_norm_eps=1e-5)


def one_token(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_bytes())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")


@pytest.mark.parametrize("change", [one_weight, swapped_weights, rope_theta, norm_epsilon, one_token, chat_template])
def test_fingerprint_sees(change: Callable[[Path], None], tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    before = load(folder).info.fingerprint
    change(folder)
    assert load(folder).info.fingerprint != before


def test_fingerprint_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    first = load(folder).info.fingerprint

    def recompute(*_: Any) -> str:
        return "recomputed"

    monkeypatch.setattr(base_model, "model_fingerprint", recompute)
    assert load(folder).info.fingerprint == first
    one_weight(folder)
    assert load(folder).info.fingerprint == "recomputed"


@pytest.mark.parametrize("note", [b"", b"[]", b'{"files": 1}', b"\xff"])
def test_a_broken_note_of_the_fingerprint_is_ignored(note: bytes, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    first = load(folder).info.fingerprint
    (stored,) = (tmp_path / "cache/digests").iterdir()
    stored.write_bytes(note)
    assert load(folder).info.fingerprint == first


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    (tmp_path / "file").touch()
    assert load(folder, cache_dir=tmp_path / "file").info.fingerprint == load(folder).info.fingerprint


@pytest.mark.model
def test_the_default_model(default_base: BaseModel) -> None:
    info = default_base.info
    assert (info.name, info.architecture) == ("smollm2-135m-instruct", "LlamaForCausalLM")
    assert (info.num_layers, info.hidden_size, info.num_kv_heads, info.head_dim) == (30, 576, 3, 64)
    assert (info.vocab_size, info.max_model_len) == (49152, 8192)
    # Shipped prompts name it: a change here makes them prompts of another model.
    assert info.fingerprint == KNOWN_FINGERPRINT
    ids = default_base.tokenizer("The capital of France is", return_tensors="pt").input_ids
    after = int(default_base.model(ids).logits[0, -1].argmax())
    assert default_base.tokenizer.decode([after]) == " Paris"


@pytest.mark.parametrize(
    ("rope", "fine"),
    [
        ({"rope_type": "default", "rope_theta": 10_000.0}, True),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}, True),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}, True),  # up to the model's own length
        (
            {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 256},
            False,
        ),
    ],
)
def test_a_rotation_that_depends_on_the_longest_row_is_refused(rope: dict[str, Any], fine: bool) -> None:
    model = tiny_model("llama")
    model.config.rope_parameters = rope
    if fine:
        describe(model, name="x", fingerprint="y")
    else:
        with pytest.raises(InvalidBaseModel, match="SOFTPROMPT_MAX_MODEL_LEN to at most 256"):
            describe(model, name="x", fingerprint="y")
        assert describe(model, name="x", fingerprint="y", max_model_len=256).max_model_len == 256
