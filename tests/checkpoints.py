"""A registry's smallest inputs: a base model's dimensions, checkpoints for it, and its log as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from app.checkpoint import Checkpoint, read_checkpoint
from app.manifest import ManifestInput
from app.registry import Store
from app.soft_prompt import BaseInfo

BASE = BaseInfo(
    name="tiny",
    fingerprint="sha256:" + "1" * 64,
    architecture="LlamaForCausalLM",
    hidden_size=8,
    num_layers=2,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=32,
    max_model_len=64,
)
TENSORS_FILE = "adapter_model.safetensors"


def checkpoint(content: int, **manifest: Any) -> Checkpoint:
    """Four virtual tokens whose every element is `content`."""
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    tensors = save({"prompt_embeddings": torch.full((4, BASE.hidden_size), float(content))})
    return read_checkpoint(json.dumps(config).encode(), tensors, ManifestInput(**manifest), BASE)


def log_entries(root: Path, task: str) -> list[dict[str, Any]]:
    """The log as JSON, once its chain has been checked by the store."""
    entries = Store(root).read_log(task, 0)
    assert [entry.prev for entry in entries] == [None, *(entry.head.digest for entry in entries[:-1])]
    return [json.loads(entry.data) for entry in entries]
