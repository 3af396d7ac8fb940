"""Checkpoints that do not fit: each refusal has its own code and names the value and the limit."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from app.checkpoint import Checkpoint, Limits, read_checkpoint
from app.errors import InvalidPromptFile
from app.manifest import ManifestInput
from app.soft_prompt import BaseInfo

BASE = BaseInfo(
    name="tiny-llama",
    fingerprint="sha256:00",
    architecture="LlamaForCausalLM",
    hidden_size=32,
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=64,
    max_model_len=64,
)
SHARED = torch.linspace(-1, 1, 5 * 32).view(5, 32)
COLS = torch.linspace(-1, 1, 3 * 5 * 2).view(3, 5, 2)
ROWS = torch.linspace(-1, 1, 3 * 2 * 32).view(3, 2, 32)
PREFIX = torch.linspace(-1, 1, 5 * 64).view(5, 64)
MULTITASK = {"prompt_embeddings": SHARED, "prefix_task_cols": COLS, "prefix_task_rows": ROWS}
NAN, INF = float("nan"), float("inf")


def read(
    tensors: dict[str, torch.Tensor] | bytes | None = None,
    *,
    task_id: int = 0,
    template: str | None = None,
    labels: list[str] | None = None,
    limits: Limits | None = None,
    raw: bytes | None = None,
    **config: Any,
) -> Checkpoint:
    """A checkpoint that is good unless an argument spoils it."""
    peft_type = config.setdefault("peft_type", "PROMPT_TUNING")
    config = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5} | config
    if tensors is None:
        good = {"MULTITASK_PROMPT_TUNING": MULTITASK, "PREFIX_TUNING": {"prompt_embeddings": PREFIX}}
        tensors = good.get(peft_type, {"prompt_embeddings": SHARED})
    return read_checkpoint(
        json.dumps(config).encode() if raw is None else raw,
        tensors if isinstance(tensors, bytes) else save(tensors),
        ManifestInput(task_id=task_id, template=template, labels=labels),
        BASE,
        limits=limits or Limits(),
    )


def spoilt(tensor: torch.Tensor, value: float) -> torch.Tensor:
    copy = tensor.clone()
    copy.view(-1)[-1] = value
    return copy


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"task_type": None, "num_transformer_submodules": None, "token_dim": None},
        {"num_attention_heads": 4, "num_layers": 2, "token_dim": 32, "num_transformer_submodules": 1},
        {"peft_type": "PREFIX_TUNING"},
        {"peft_type": "PREFIX_TUNING", "num_attention_heads": 2, "num_layers": 2, "token_dim": 16},
        {"peft_type": "MULTITASK_PROMPT_TUNING", "task_id": 2},
        {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 3, "num_ranks": 2},
        {"template": "{input}", "labels": ["a", "b"]},
    ],
)
def test_good_checkpoints_pass_without_warnings(config: dict[str, Any]) -> None:
    assert read(**config).warnings == ()


PREFIX_TUNING = {"peft_type": "PREFIX_TUNING"}
MULTI = {"peft_type": "MULTITASK_PROMPT_TUNING"}
BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("config_too_large", "70000", {"raw": b" " * 70_000}),
    ("invalid_config", "Expecting value", {"raw": b""}),
    ("invalid_config", "not a JSON object", {"raw": b"[]"}),
    ("invalid_config", "'peft_type' occurs twice", {"raw": b'{"peft_type": "CPT", "peft_type": "CPT"}'}),
    ("invalid_config", "deeper than 32", {"raw": b"[" * 60_000}),
    ("invalid_config", "utf-8", {"raw": b'{"\xff": 1}'}),
    ("invalid_config", "'num_virtual_tokens': Field required", {"raw": b'{"peft_type": "CPT"}'}),
    *(("invalid_config", "'num_virtual_tokens'", {"num_virtual_tokens": n}) for n in (0, -1, "5", 5.0, True, None)),
    ("invalid_config", "10000 digits", {"raw": b'{"num_virtual_tokens": ' + b"1" * 10_000 + b"}"}),
    ("invalid_config", "'token_dim'", {"token_dim": [32]}),
    ("invalid_config", "'base_model_name_or_path'", {"base_model_name_or_path": 1}),
    ("unsupported_peft_type", "is 'LORA' but must be one of PROMPT_TUNING, P_TUNING", {"peft_type": "LORA"}),
    ("unsupported_peft_type", "'prompt_tuning'", {"peft_type": "prompt_tuning"}),
    ("unsupported_peft_type", "None", {"peft_type": None}),
    ("unsupported_peft_type", "['CPT']", {"peft_type": ["CPT"], "tensors": b""}),
    ("unsupported_peft_type", "'xxx", {"peft_type": "x" * 9_000}),
    ("unsupported_peft_type", "None", {"raw": b"{}"}),
    ("unsupported_task_type", "'SEQ_2_SEQ_LM'", {"task_type": "SEQ_2_SEQ_LM"}),
    ("unsupported_task_type", "''", {"task_type": ""}),
    ("unsupported_submodules", "is 2 but must be 1", {"num_transformer_submodules": 2}),
    ("unsupported_submodules", "is 0 but must be 1", {"num_transformer_submodules": 0}),
    ("too_many_virtual_tokens", "is 63 but may be at most 62", {"num_virtual_tokens": 63}),
    ("too_many_virtual_tokens", "at most 62", {"num_virtual_tokens": 10**9}),
    ("too_many_virtual_tokens", "is 5 but may be at most 4", {"limits": Limits(max_virtual_tokens=4)}),
    ("hidden_size_mismatch", "is 64 but the base model needs 32", {"token_dim": 64}),
    ("hidden_size_mismatch", "is 33 wide", {"tensors": {"prompt_embeddings": torch.ones(5, 33)}}),
    ("layer_count_mismatch", "is 3 but the base model needs 2", {**PREFIX_TUNING, "num_layers": 3}),
    ("kv_heads_mismatch", "is 4 but the base model needs 2", {**PREFIX_TUNING, "num_attention_heads": 4}),
    ("head_dim_mismatch", "is 32 but the base model needs 16", {**PREFIX_TUNING, "token_dim": 32}),
    (
        "tensor_shape_mismatch",
        "is 96 wide but the base model needs 64 (2 layers x 2 x 2 KV heads x 8)",
        {**PREFIX_TUNING, "tensors": {"prompt_embeddings": torch.ones(5, 96)}},
    ),
    ("tensor_shape_mismatch", "1 dimensions", {"tensors": {"prompt_embeddings": torch.ones(160)}}),
    ("tensor_shape_mismatch", "3 dimensions", {"tensors": {"prompt_embeddings": torch.ones(1, 5, 32)}}),
    ("tensor_shape_mismatch", "(2, 5, 2)", {**MULTI, "num_tasks": 2}),
    ("tensor_shape_mismatch", "(3, 5, 1)", {**MULTI, "num_ranks": 1}),
    (
        "tensor_shape_mismatch",
        "(3, 2, 32)",
        {**MULTI, "tensors": {**MULTITASK, "prefix_task_rows": ROWS[:2].clone()}},
    ),
    (
        "tensor_shape_mismatch",
        "(3, 5, 2)",
        {**MULTI, "tensors": {**MULTITASK, "prefix_task_cols": COLS[:, :4].clone()}},
    ),
    ("tensor_shape_mismatch", "(4,)", {**MULTI, "tensors": {**MULTITASK, "prefix_task_cols": torch.ones(4)}}),
    (
        "num_virtual_tokens_mismatch",
        "holds 5 virtual tokens but adapter_config.json says 6",
        {"num_virtual_tokens": 6},
    ),
    ("missing_tensor", "prompt_embeddings", {"tensors": {"weight": SHARED}}),
    ("missing_tensor", "prefix_task_cols", {**MULTI, "tensors": {"prompt_embeddings": SHARED}}),
    ("unexpected_tensor", "prefix_task_cols", {"tensors": MULTITASK}),
    (
        "unexpected_tensor",
        "'base_model.model.lm_head.weight'",
        {"tensors": {"prompt_embeddings": SHARED, "base_model.model.lm_head.weight": COLS}},
    ),
    ("unexpected_tensor", "'../../x\\x00'", {"tensors": {"prompt_embeddings": SHARED, "../../x\0": COLS}}),
    ("task_id_out_of_range", "is 3 but the checkpoint holds 3", {**MULTI, "task_id": 3}),
    ("task_id_out_of_range", "is 1 but the checkpoint holds 1", {"task_id": 1}),
    *(
        (
            "non_finite",
            "prompt_embeddings",
            {"tensors": {"prompt_embeddings": spoilt(SHARED.to(dtype), value)}},
        )
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for value in (NAN, INF, -INF)
    ),
    ("non_finite", "prompt_embeddings", {"tensors": {"prompt_embeddings": torch.full((5, 32), NAN)}}),
    (
        "non_finite",
        "prompt_embeddings",
        {**PREFIX_TUNING, "tensors": {"prompt_embeddings": spoilt(PREFIX, NAN)}},
    ),
    (
        "non_finite",
        "prefix_task_cols",
        {**MULTI, "tensors": {**MULTITASK, "prefix_task_cols": spoilt(COLS, INF)}},
    ),
    (
        "non_finite",
        "the prompt",
        {**MULTI, "tensors": {name: tensor * 1e30 for name, tensor in MULTITASK.items()}},
    ),
    ("file_too_large", "may have 700", {"limits": Limits(max_file_bytes=700)}),
    ("header_too_large", "may have 50", {"limits": Limits(max_header_bytes=50)}),
    ("too_many_tensors", "has 3 tensors but may have 2", {**MULTI, "limits": Limits(max_tensors=2)}),
    ("not_safetensors", "zip archive", {"tensors": b"PK\x03\x04" + bytes(1000)}),
    ("truncated_file", "0 bytes", {"tensors": b""}),
    ("invalid_manifest", "{input}", {"template": "no place for it"}),
    ("invalid_manifest", "'a' occurs twice", {"labels": ["a", "b", "a"]}),
]


@pytest.mark.parametrize(("code", "says", "spoil"), BAD, ids=[f"{i}-{code}" for i, (code, _, _) in enumerate(BAD)])
def test_bad_checkpoints_are_refused_with_their_code(code: str, says: str, spoil: dict[str, Any]) -> None:
    with pytest.raises(InvalidPromptFile) as caught:
        read(**spoil)
    assert caught.value.code == code, caught.value.message
    assert says in caught.value.message
    assert len(caught.value.message) < 300 and caught.value.message.isascii()


@pytest.mark.parametrize(
    "spoil",
    [
        {"raw": b'{"a":' * 10_000},
        {"raw": b"{" + b",".join(b'"k%d":1' % i for i in range(6000)) + b"}"},
        {"tensors": (60_000).to_bytes(8, "little") + b"{" + b'"a":' * 14_999 + b"}}}"},
        {"tensors": {f"t{i}": torch.ones(1) for i in range(1000)}},
        {"labels": [str(i) for i in range(999)] + ["0"]},
    ],
)
def test_refusing_takes_less_than_50_ms(spoil: dict[str, Any]) -> None:
    if isinstance(spoil.get("tensors"), dict):
        spoil = {"tensors": save(spoil["tensors"])}
    seconds = []  # of this thread alone: the machine may be busy
    for _ in range(3):
        started = time.thread_time()
        with pytest.raises(InvalidPromptFile):
            read(**spoil)
        seconds.append(time.thread_time() - started)
    assert min(seconds) < 0.05


GOOD = save({"prompt_embeddings": SHARED})


@given(changes=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None, database=None)
def test_changed_bytes_are_refused_or_read_as_they_are(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for position, value in changes:
        data[position] = value
    try:
        checkpoint = read(bytes(data))
    except InvalidPromptFile:
        return
    stored = torch.frombuffer(data[-5 * 32 * 4 :], dtype=torch.float32).view(5, 32)
    expected = load(bytes(data))["prompt_embeddings"].float()
    assert torch.equal(checkpoint.prompt.tensor, expected)
    assert torch.equal(checkpoint.prompt.tensor, stored)
