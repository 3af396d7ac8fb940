"""Valid prompt files of all six PEFT types, small, as parts that a fuzzer can spoil one by one."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from random import Random
from typing import Any

from app.soft_prompt import BaseInfo

PEFT_TYPES = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "PREFIX_TUNING", "CARTRIDGE")
KV_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
SIZES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass
class Draft:
    """A checkpoint before it becomes bytes."""

    config: dict[str, Any]
    header: dict[str, Any] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)
    task_id: int = 0

    @property
    def names(self) -> list[str]:
        return [name for name in self.header if name != "__metadata__"]

    def add(self, name: str, dtype: str, shape: list[int], values: bytes) -> None:
        start = len(self.data)
        self.data += values
        self.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(self.data)]}


def pack_values(dtype: str, values: list[float]) -> bytes:
    """Numbers as they stand in a file; BF16 is the upper half of F32."""
    if dtype == "F16":
        return struct.pack(f"<{len(values)}e", *values)
    packed = struct.pack(f"<{len(values)}f", *values)
    if dtype == "F32":
        return packed
    return b"".join(packed[i + 2 : i + 4] for i in range(0, len(packed), 4))


def pack_file(header: bytes, data: bytes | bytearray) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def pack_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def valid_draft(rng: Random, base: BaseInfo) -> Draft:
    """Any type, dtype, size and number of tasks, with or without metadata and the keys that PEFT leaves null."""
    peft_type = rng.choice(PEFT_TYPES)
    n = rng.randint(1, 5)
    config: dict[str, Any] = {"peft_type": peft_type, "num_virtual_tokens": n}
    optional: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "num_transformer_submodules": 1,
        "token_dim": base.hidden_size,
        "num_layers": base.num_layers,
        "num_attention_heads": base.num_kv_heads,
        "inference_mode": True,
        "encoder_num_layers": 2,  # numbers that nobody reads: they must be strict JSON all the same
        "encoder_hidden_size": 64,
        "peft_version": "0.21.2",
    }
    config |= {key: rng.choice((value, value, None)) for key, value in optional.items() if rng.random() < 0.5}
    draft = Draft(config)
    if rng.random() < 0.4:
        draft.header["__metadata__"] = {"format": "pt"} if rng.random() < 0.8 else {}
    kv_width = base.num_layers * 2 * base.num_kv_heads * base.head_dim
    width = kv_width if peft_type in KV_TYPES else base.hidden_size
    shapes = {"prompt_embeddings": [n, width]}
    if peft_type == "MULTITASK_PROMPT_TUNING":
        tasks, rank = rng.randint(1, 3), rng.randint(1, 2)
        shapes |= {"prefix_task_cols": [tasks, n, rank], "prefix_task_rows": [tasks, rank, width]}
        draft.task_id = rng.randrange(tasks)
        if rng.random() < 0.5:
            config |= {"num_tasks": tasks, "num_ranks": rank}
    names = list(shapes)
    rng.shuffle(names)
    for name in names:
        dtype = rng.choice(tuple(SIZES))
        count = 1
        for size in shapes[name]:
            count *= size
        draft.add(name, dtype, shapes[name], pack_values(dtype, [rng.uniform(-4, 4) for _ in range(count)]))
    return draft
