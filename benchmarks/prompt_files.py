"""A soft prompt as the PEFT checkpoint that both PEFT and this server read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from benchmarks.workload import Floats


def prompt_files(prompt: Floats, *, num_layers: int, num_heads: int) -> dict[str, bytes]:
    """File name -> content."""
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": prompt.shape[0],
        "token_dim": prompt.shape[1],
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
    }
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save({"prompt_embeddings": prompt}),
    }


def write_prompt(folder: Path, prompt: Floats, config: Any) -> None:
    """`config` is the base model's transformers configuration."""
    files = prompt_files(prompt, num_layers=config.num_hidden_layers, num_heads=config.num_attention_heads)
    for name, content in files.items():
        (folder / name).write_bytes(content)
