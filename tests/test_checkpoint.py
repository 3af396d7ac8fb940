"""Checkpoints as PEFT writes and reads them: PEFT is the oracle, for every type and several architectures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load, save

from app.checkpoint import Checkpoint, content_digest, read_checkpoint, read_manifest, write_checkpoint
from app.errors import InvalidPromptFile
from app.manifest import BaseReference, Defaults, ManifestInput
from app.soft_prompt import SoftPrompt
from tests.api_harness import files
from tests.tiny import ARCHITECTURES, tiny_base, tiny_info, tiny_model

# PEFT 0.21 with transformers 5.23: is_gradient_checkpointing has a new name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

N = 5
COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N}
EMBEDDING_CONFIGS: dict[str, Callable[[], Any]] = {
    "PROMPT_TUNING": lambda: PromptTuningConfig(**COMMON),
    "P_TUNING": lambda: PromptEncoderConfig(**COMMON, encoder_hidden_size=16),
    "P_TUNING-lstm": lambda: PromptEncoderConfig(
        **COMMON, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
    "CPT": lambda: CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[9, 8, 7, 6, 5],
        cpt_mask=[1] * N,
        cpt_tokens_type_mask=[1, 2, 3, 4, 1],
    ),
}
KV_CONFIGS: dict[str, Callable[[], Any]] = {
    "PREFIX_TUNING": lambda: PrefixTuningConfig(**COMMON),
    "PREFIX_TUNING-projection": lambda: PrefixTuningConfig(**COMMON, prefix_projection=True, encoder_hidden_size=16),
    "CARTRIDGE": lambda: CartridgeConfig(**COMMON, num_frozen_tokens=0),
    "CARTRIDGE-frozen": lambda: CartridgeConfig(**COMMON, num_frozen_tokens=2),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def saved_by_peft(config: Any, folder: Path, architecture: str = "llama") -> tuple[bytes, bytes]:
    """A checkpoint with random parameters, as PEFT writes it."""
    model = get_peft_model(tiny_model(architecture), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    return (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()


def peft_prompt(folder: Path, architecture: str = "llama", task_id: int = 0) -> torch.Tensor:
    """What PEFT puts before the text after loading the folder, in our layout."""
    model = PeftModel.from_pretrained(tiny_model(architecture), folder)
    prompt = model.get_prompt(1, task_ids=torch.tensor([task_id]))
    if isinstance(prompt, torch.Tensor):
        return prompt[0].detach()
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in prompt.layers]).detach()


def read(config: bytes, tensors: bytes, architecture: str = "llama", **manifest: Any) -> Checkpoint:
    return read_checkpoint(config, tensors, ManifestInput(**manifest), tiny_info(tiny_model(architecture)))


@pytest.mark.parametrize("name", EMBEDDING_CONFIGS)
def test_reads_the_embeddings_that_peft_would_use(name: str, tmp_path: Path) -> None:
    config, tensors = saved_by_peft(EMBEDDING_CONFIGS[name](), tmp_path)
    checkpoint = read(config, tensors)
    assert checkpoint.peft_type == name.partition("-")[0]
    assert checkpoint.prompt.kind == "embedding"
    assert checkpoint.prompt.num_virtual_tokens == N
    assert torch.equal(checkpoint.prompt.tensor, peft_prompt(tmp_path))
    assert checkpoint.warnings == ()


def test_each_task_of_a_multitask_checkpoint_is_the_prompt_that_peft_would_use(tmp_path: Path) -> None:
    peft_config = MultitaskPromptTuningConfig(**COMMON, num_tasks=3, num_ranks=2)
    config, tensors = saved_by_peft(peft_config, tmp_path)
    prompts = [read(config, tensors, task_id=task_id).prompt for task_id in range(3)]
    for task_id, prompt in enumerate(prompts):
        torch.testing.assert_close(prompt.tensor, peft_prompt(tmp_path, task_id=task_id), rtol=1e-6, atol=1e-6)
    assert len({prompt.digest for prompt in prompts}) == 3
    assert read(config, tensors).warnings == ()


@pytest.mark.parametrize("name", KV_CONFIGS)
def test_reads_the_keys_and_values_that_peft_would_use(name: str, tmp_path: Path) -> None:
    config, tensors = saved_by_peft(KV_CONFIGS[name](), tmp_path)
    checkpoint = read(config, tensors)
    assert checkpoint.prompt.kind == "kv"
    assert checkpoint.prompt.tensor.shape == (3, 2, 2, N, 8)
    assert torch.equal(checkpoint.prompt.tensor, peft_prompt(tmp_path))
    assert checkpoint.warnings == ()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kv_layout_and_written_files_agree_with_peft_on_every_architecture(architecture: str, tmp_path: Path) -> None:
    checkpoint = read(*saved_by_peft(KV_CONFIGS["PREFIX_TUNING"](), tmp_path / "a", architecture), architecture)
    assert torch.equal(checkpoint.prompt.tensor, peft_prompt(tmp_path / "a", architecture))
    write_checkpoint(checkpoint.prompt, tmp_path / "b", base_name=f"tiny-{architecture}")
    assert torch.equal(checkpoint.prompt.tensor, peft_prompt(tmp_path / "b", architecture))


@pytest.mark.parametrize("shape", [(N, 32), (3, 2, 2, N, 8)])
def test_written_checkpoints_load_in_peft_and_here(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(2)
    prompt = SoftPrompt("embedding" if len(shape) == 2 else "kv", torch.randn(shape), "sha256:0")
    write_checkpoint(prompt, tmp_path / "new" / "folder", base_name="someone/Tiny-Llama")
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert torch.equal(prompt.tensor, peft_prompt(folder))
    again = read(*((folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")))
    assert again.prompt.kind == prompt.kind
    assert torch.equal(again.prompt.tensor, prompt.tensor)
    assert again.warnings == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_half_precision_files_are_widened_exactly(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, tensors = saved_by_peft((EMBEDDING_CONFIGS | KV_CONFIGS)[name](), tmp_path)
    halved = save({"prompt_embeddings": load(tensors)["prompt_embeddings"].to(dtype)})
    (tmp_path / "adapter_model.safetensors").write_bytes(halved)
    prompt = read(config, halved).prompt
    assert prompt.tensor.dtype == torch.float32
    assert torch.equal(prompt.tensor, peft_prompt(tmp_path))


PROMPT = torch.linspace(-1, 1, N * 32).view(N, 32)
CONFIG = {
    "peft_type": "PROMPT_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": N,
    "token_dim": 32,
    "base_model_name_or_path": "someone/Tiny-Llama/",
}


def warnings_of(tensor: torch.Tensor = PROMPT, base: dict[str, str] | None = None, **changes: Any) -> tuple[str, ...]:
    reference = None if base is None else BaseReference(**base)
    data = save({"prompt_embeddings": tensor})
    return read(json.dumps(CONFIG | changes).encode(), data, base=reference).warnings


def test_dangerous_and_unknown_keys_have_no_effect_and_are_reported() -> None:
    (warning,) = warnings_of(
        auto_mapping={"base_model_class": "os", "parent_library": "os"},
        tokenizer_kwargs={"trust_remote_code": True},
        prompt_tuning_init_state_dict_path="/etc/passwd",
        megatron_core="os",
        modules_to_save=None,
    )
    keys = ("'auto_mapping'", "'megatron_core'", "'prompt_tuning_init_state_dict_path'", "'tokenizer_kwargs'")
    assert warning == f"adapter_config.json: {', '.join(keys)} have no effect here"


def test_many_unknown_keys_make_one_short_warning() -> None:
    (warning,) = warnings_of(**{f"x{i:04}" * 20: 1 for i in range(300)})
    assert warning.endswith(" and 290 more have no effect here")
    assert len(warning) < 1000


def test_another_base_of_the_same_shape_is_a_warning() -> None:
    info = tiny_info(tiny_model("llama"))
    same = {"name": "renamed", "fingerprint": info.fingerprint}
    assert warnings_of(base=same, base_model_name_or_path="/home/me/my-finetune", num_layers=7) == ()
    (warning,) = warnings_of(base={"name": "tiny-llama", "fingerprint": "sha256:ff"})
    assert "sha256:ff" in warning and info.fingerprint in warning
    named = warnings_of(base={"name": "x/Other"}, base_model_name_or_path="C:\\models\\Third", num_layers=7)
    assert named == (
        "adapter_config.json: trained on 'Third', served on tiny-llama",
        "manifest.json: trained on 'Other', served on tiny-llama",
        "adapter_config.json: trained on 7 layers, served on 3",
    )


def test_magnitudes_beyond_float16_are_a_warning() -> None:
    assert warnings_of(torch.full((N, 32), 65504.0)) == ()
    (warning,) = warnings_of(torch.full((N, 32), -65505.0))
    assert "float16" in warning


@pytest.mark.parametrize(
    ("value", "warned"), [(0.0, True), (0.04, True), (0.06, False), (1.0, False), (19.0, False), (21.0, True)]
)
def test_norms_far_from_the_embeddings_are_a_warning(value: float, warned: bool) -> None:
    info = replace(tiny_base("llama").info, embedding_norm=32**0.5)
    given = files(value)
    found = read_checkpoint(given["adapter_config"], given["adapter_model"], ManifestInput(), info).warnings
    assert len(found) == warned and all("median norm" in warning for warning in found)


def test_the_norm_of_the_embeddings_is_that_of_the_table() -> None:
    base = tiny_base("llama")
    norms = base.model.get_input_embeddings().weight.norm(dim=1)
    assert base.info.embedding_norm == pytest.approx(float(norms.median()), abs=1e-4)


def test_digest_names_the_content() -> None:
    config, tensors = b"ab", b"c"
    plain = content_digest(config, tensors, ManifestInput())
    assert plain == content_digest(b"ab", b"c", ManifestInput(description="", defaults=Defaults(), task_id=0))
    others = [
        content_digest(b"a", b"bc", ManifestInput()),
        content_digest(b"ab", b"d", ManifestInput()),
        *(content_digest(config, tensors, ManifestInput(task_id=i)) for i in (1, 2)),
        content_digest(config, tensors, ManifestInput(tags={"a": "b"})),
        content_digest(config, tensors, ManifestInput(template="{input}")),
    ]
    assert len({plain, *others}) == 7
    # Stored digests must survive every later release, so the recipe is pinned byte by byte.
    recipe = b"softprompt checkpoint 1\n"
    for part in (b"ab", b"c", b"{}"):
        recipe += bytes([len(part)]) + bytes(7) + part
    assert plain == f"sha256:{hashlib.sha256(recipe).hexdigest()}"


def test_digest_ignores_the_order_of_keys() -> None:
    one, two = ManifestInput(tags={"a": "1", "b": "2"}), ManifestInput(tags={"b": "2", "a": "1"})
    assert content_digest(b"", b"", one) == content_digest(b"", b"", two)


def test_prompt_carries_the_digest_of_the_three_parts() -> None:
    config, tensors = json.dumps(CONFIG).encode(), save({"prompt_embeddings": PROMPT})
    checkpoint = read(config, tensors, description="d")
    assert (checkpoint.config, checkpoint.tensors) == (config, tensors)
    assert checkpoint.prompt.digest == content_digest(config, tensors, ManifestInput(description="d"))


def test_reading_does_not_share_memory_with_the_upload() -> None:
    tensors = save({"prompt_embeddings": PROMPT})
    checkpoint = read(json.dumps(CONFIG).encode(), tensors)
    checkpoint.prompt.tensor.zero_()
    assert torch.equal(load(tensors)["prompt_embeddings"], PROMPT)


def test_an_exported_manifest_can_be_uploaded_again() -> None:
    mine = ManifestInput(
        base=BaseReference(name="b", fingerprint="sha256:1"),
        template="{input}\nAnswer:",
        labels=["yes", "no"],
        defaults=Defaults(max_tokens=3, temperature=1, stop=["\n"]),
        metrics={"accuracy": 0.9, "by": {"label": [1, None, True]}},
        tags={"é": "😀"},
    )
    server = {"digest": "x", "created_at": "y", "peft_type": 7, "num_virtual_tokens": None, "size_bytes": []}
    exported = json.dumps(mine.model_dump() | server)
    assert read_manifest(exported.encode()) == mine
    assert read_manifest(b"{}") == ManifestInput()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "Expecting value"),
        (b"[]", "not a JSON object"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ('{"description": "a"}'.encode("utf-16"), "utf-8"),
        (b'{"description": "\xff"}', "utf-8"),
        (b'{"description": "\\ud800"}', "surrogates"),
        (b'{"tags": {"\\udfff": ""}}', "surrogates"),
        (b'{"task_id": 1, "task_id": 2}', "'task_id' occurs twice"),
        (b'{"metrics": {"a": {"b": 1, "b": 1}}}', "'b' occurs twice"),
        (b'{"metrics": {"a": NaN}}', "NaN"),
        (b'{"metrics": {"a": -Infinity}}', "-Infinity"),
        (b'{"metrics": {"a": 1e999}}', "1e999"),
        (b'{"metrics": {"a": ' + b"1" * 5000 + b"}}", "5000 digits"),
        (b'{"metrics": ' + b'{"a":' * 40 + b"1" + b"}" * 41, "deeper than 32"),
        (b'{"metrics": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deeper than 32"),
        (b'{"metrics": ' + b"[" * 100_000, "deeper than 32"),
        (b'{"description": "' + b"a" * (1 << 20) + b'"}', "may have 1048576"),
        (b'{"templat": "{input}"}', "unknown key 'templat'"),
        (b'{"base": {"name": "a", "path": "/"}}', "unknown key 'base.path'"),
        (b'{"' + b"k" * 10_000 + b'": 1}', "unknown key 'kkk"),
        (b'{"task_id": "1"}', "'task_id': Input should be a valid integer"),
        (b'{"task_id": true}', "'task_id': Input should be a valid integer"),
        (b'{"task_id": -1}', "greater than or equal to 0"),
        (b'{"labels": ["a"]}', "at least 2 items"),
        (b'{"defaults": {"max_tokens": 0}}', "'defaults.max_tokens'"),
        (b"{} {}", "Extra data"),
    ],
)
def test_bad_manifests_are_refused(data: bytes, says: str) -> None:
    with pytest.raises(InvalidPromptFile) as caught:
        read_manifest(data)
    assert (caught.value.code, caught.value.param) == ("invalid_manifest", "manifest")
    assert says in caught.value.message
    assert len(caught.value.message) < 300 and caught.value.message.isascii()


def test_a_manifest_that_is_no_json_is_refused_whoever_built_it() -> None:
    for metrics in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises(InvalidPromptFile) as caught:
            content_digest(b"", b"", ManifestInput(metrics=metrics))
        assert caught.value.code == "invalid_manifest"
