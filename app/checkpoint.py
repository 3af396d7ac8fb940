"""PEFT checkpoints: read strictly from bytes, and written so that PEFT can load them.

Layouts are those of PEFT 0.21. Embedding types keep `prompt_embeddings` [n, hidden], their encoder folded in;
MULTITASK_PROMPT_TUNING (Wang et al. 2023) multiplies it by a low-rank matrix per task; the KV types keep
[n, layers x 2 x KV heads x head_dim]. Nothing here opens a file an upload names, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import ValidationError
from safetensors.torch import load, save

from app.adapter_config import KV_TYPES, AdapterConfig, check_dimensions, describe, read_config
from app.errors import InvalidPromptFile, InvalidRequest
from app.manifest import ManifestInput
from app.safetensors_header import SafetensorsHeader, read_header
from app.soft_prompt import BaseInfo, Kind, SoftPrompt
from app.strict_json import parse_object, shorten
from app.text import Template

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"

MAX_MANIFEST_BYTES = 1 << 20
MAX_FLOAT16 = 65504.0
# Embeddings are around 1 and the outliers of keys below 1000. Squares in a norm overflow float32 from 1e19 on, and
# behind an overflow that a norm turns into 0 the logits are finite again: a trial run would not show it.
MAX_MAGNITUDE = 1e6
# Of virtual tokens over embeddings, by their medians. Those of the shipped prompts are 1.8 to 5.1.
MAX_NORM_RATIO = 20.0
# What the server adds to a manifest; an exported one may be uploaded again.
_SERVER_KEYS = ("digest", "created_at", "peft_type", "num_virtual_tokens", "size_bytes")

_SHARED, _COLS, _ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"


@dataclass(frozen=True)
class Limits:
    """What a checkpoint may cost."""

    max_file_bytes: int = 64 << 20
    max_header_bytes: int = 64 << 10
    max_tensors: int = 64
    max_config_bytes: int = 64 << 10
    max_virtual_tokens: int = 8192  # and at most the base's max_model_len - 2


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A PEFT checkpoint folder that has been read and checked."""

    config: bytes = field(repr=False)  # adapter_config.json as it came
    tensors: bytes = field(repr=False)  # adapter_model.safetensors as it came
    manifest: ManifestInput
    peft_type: str
    prompt: SoftPrompt
    warnings: tuple[str, ...]


def read_checkpoint(
    config: bytes,
    tensors: bytes,
    manifest: ManifestInput,
    base: BaseInfo,
    *,
    limits: Limits = DEFAULT_LIMITS,
) -> Checkpoint:
    """Check the files against each other and against the base model, and build the soft prompt.

    Needs about twice the prompt's float32 size beside `tensors` itself. Raises InvalidPromptFile; `code` is
    one of those of `read_config`, `check_dimensions` and `read_header`, or file_too_large, missing_tensor,
    unexpected_tensor, tensor_shape_mismatch, hidden_size_mismatch, num_virtual_tokens_mismatch,
    task_id_out_of_range, non_finite, magnitude_too_large, invalid_manifest.
    """
    _check_manifest(manifest)
    if len(tensors) > limits.max_file_bytes:
        _refuse("file_too_large", f"the file has {len(tensors)} bytes but may have {limits.max_file_bytes}")
    adapter, warnings = read_config(config, max_bytes=limits.max_config_bytes)
    header = read_header(tensors, max_header_bytes=limits.max_header_bytes, max_tensors=limits.max_tensors)
    check_dimensions(adapter, base, max_virtual_tokens=limits.max_virtual_tokens)
    _check_shapes(adapter, header, manifest.task_id, base)
    tensor, largest = _decode(adapter, tensors, manifest.task_id, base)
    kind: Kind = "kv" if adapter.peft_type in KV_TYPES else "embedding"
    return Checkpoint(
        config=config,
        tensors=tensors,
        manifest=manifest,
        peft_type=adapter.peft_type,
        prompt=SoftPrompt(kind, tensor, content_digest(config, tensors, manifest)),
        warnings=(
            warnings
            + _base_warnings(adapter, manifest, base)
            + _range_warnings(largest)
            + _norm_warnings(kind, tensor, base)
        ),
    )


def content_digest(config: bytes, tensors: bytes, manifest: ManifestInput) -> str:
    """Identity of a version: "sha256:<hex>" over the three parts, each with its length in front.

    The manifest counts as JSON with sorted keys and without values equal to their defaults, so that a field
    added later leaves older digests alone. Raises InvalidPromptFile if it cannot be written as JSON.
    """
    try:
        values = manifest.model_dump(exclude_defaults=True)
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        _refuse("invalid_manifest", "metrics and lineage must be JSON with finite numbers", file=MANIFEST_FILE)
    found = hashlib.sha256(b"softprompt checkpoint 1\n")
    for part in (config, tensors, canonical.encode()):
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return f"sha256:{found.hexdigest()}"


def write_checkpoint(prompt: SoftPrompt, folder: Path, *, base_name: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors (float32) into `folder`, made if absent.

    An embedding becomes PROMPT_TUNING, keys and values become PREFIX_TUNING; PEFT loads both.
    """
    config: dict[str, Any] = {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompt.num_virtual_tokens,
        "task_type": "CAUSAL_LM",
    }
    if prompt.kind == "embedding":
        flat = prompt.tensor
        config |= {"peft_type": "PROMPT_TUNING", "token_dim": flat.shape[1]}
    else:
        layers, _, heads, n, head_dim = prompt.tensor.shape
        flat = prompt.tensor.permute(3, 0, 1, 2, 4).reshape(n, -1)
        config |= {"peft_type": "PREFIX_TUNING", "token_dim": heads * head_dim}
        config |= {"num_layers": layers, "num_attention_heads": heads}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (folder / TENSORS_FILE).write_bytes(save({_SHARED: flat.contiguous()}, metadata={"format": "pt"}))


def read_manifest(data: bytes) -> ManifestInput:
    """Parse an uploaded or exported manifest.json of at most 1 MiB; what the server owns in it is dropped.

    Raises InvalidPromptFile(code="invalid_manifest"), naming the key.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        found = f"the file has {len(data)} bytes but may have {MAX_MANIFEST_BYTES}"
        _refuse("invalid_manifest", found, file=MANIFEST_FILE)
    try:
        raw = parse_object(data)
    except ValueError as error:
        _refuse("invalid_manifest", f"the file is not strict JSON: {error}", file=MANIFEST_FILE)
    try:
        return ManifestInput.model_validate({key: raw[key] for key in raw if key not in _SERVER_KEYS})
    except ValidationError as error:
        _refuse("invalid_manifest", describe(error), file=MANIFEST_FILE)


def _refuse(code: str, message: str, *, file: str = TENSORS_FILE) -> NoReturn:
    raise InvalidPromptFile(f"{file}: {message}", param=file.partition(".")[0], code=code)


def _check_manifest(manifest: ManifestInput) -> None:
    try:
        Template(manifest.template)
    except InvalidRequest as error:
        _refuse("invalid_manifest", error.message, file=MANIFEST_FILE)
    for label, count in Counter(manifest.labels).items():
        if count > 1:
            _refuse("invalid_manifest", f"the label {shorten(label)} occurs twice", file=MANIFEST_FILE)
    if manifest.calibration and not manifest.labels:
        _refuse("invalid_manifest", "calibration is for a version with labels", file=MANIFEST_FILE)


def _check_shapes(config: AdapterConfig, header: SafetensorsHeader, task_id: int, base: BaseInfo) -> None:
    """The tensors that are there, against adapter_config.json and the base."""
    multitask = config.peft_type == "MULTITASK_PROMPT_TUNING"
    expected = {_SHARED, _COLS, _ROWS} if multitask else {_SHARED}
    for name in sorted(expected - header.tensors.keys()):
        _refuse("missing_tensor", f"{config.peft_type} needs a tensor {name}")
    for name in sorted(header.tensors.keys() - expected):
        _refuse("unexpected_tensor", f"{config.peft_type} has no tensor {shorten(name)}")
    shared = header.tensors[_SHARED].shape
    if len(shared) != 2:
        _refuse("tensor_shape_mismatch", f"{_SHARED} has {len(shared)} dimensions but must have 2")
    if shared[0] != config.num_virtual_tokens:
        found = f"{_SHARED} holds {shared[0]} virtual tokens but {CONFIG_FILE} says {config.num_virtual_tokens}"
        _refuse("num_virtual_tokens_mismatch", found)
    if config.peft_type in KV_TYPES:
        width = base.num_layers * 2 * base.num_kv_heads * base.head_dim
        if shared[1] != width:
            needed = f"{width} ({base.num_layers} layers x 2 x {base.num_kv_heads} KV heads x {base.head_dim})"
            _refuse("tensor_shape_mismatch", f"{_SHARED} is {shared[1]} wide but the base model needs {needed}")
    elif shared[1] != base.hidden_size:
        found = f"{_SHARED} is {shared[1]} wide but the base model's hidden size is {base.hidden_size}"
        _refuse("hidden_size_mismatch", found)
    tasks = _check_task_factors(config, header, shared) if multitask else 1
    if task_id >= tasks:
        found = f"task_id is {task_id} but the checkpoint holds {tasks} task(s), counted from 0"
        _refuse("task_id_out_of_range", found, file=MANIFEST_FILE)


def _check_task_factors(config: AdapterConfig, header: SafetensorsHeader, shared: tuple[int, ...]) -> int:
    """Check [tasks, n, rank] and [tasks, rank, hidden] and return the number of tasks."""
    cols, rows = header.tensors[_COLS].shape, header.tensors[_ROWS].shape
    tasks = config.num_tasks or cols[0]
    ranks = config.num_ranks or cols[-1]
    for name, shape, needed in (
        (_COLS, cols, (tasks, shared[0], ranks)),
        (_ROWS, rows, (tasks, ranks, shared[1])),
    ):
        if shape != needed:
            _refuse("tensor_shape_mismatch", f"{name} has shape {shape} but must have {needed}")
    return tasks


def _decode(config: AdapterConfig, tensors: bytes, task_id: int, base: BaseInfo) -> tuple[torch.Tensor, float]:
    """The soft prompt's tensor (see SoftPrompt) and its largest magnitude."""
    loaded = load(tensors)
    for name, tensor in loaded.items():
        _largest(name, tensor)
    stored = loaded[_SHARED]
    if config.peft_type in KV_TYPES:
        # PEFT views the width as [layers x 2, KV heads, head_dim]: keys of layer i at 2i, values at 2i + 1.
        n, layers, heads, head_dim = stored.shape[0], base.num_layers, base.num_kv_heads, base.head_dim
        stored = stored.view(n, layers, 2, heads, head_dim).permute(1, 2, 3, 0, 4)
    elif config.peft_type == "MULTITASK_PROMPT_TUNING":
        factor = loaded[_COLS][task_id].float() @ loaded[_ROWS][task_id].float()
        stored = stored.float() * factor
    result = torch.empty(stored.shape, dtype=torch.float32).copy_(stored)
    largest = _largest("the prompt", result)
    if largest > MAX_MAGNITUDE:
        found = f"the prompt has magnitudes up to {largest:.4g} but may have {MAX_MAGNITUDE:.0g}"
        _refuse("magnitude_too_large", found)
    return result, largest


def _largest(name: str, tensor: torch.Tensor) -> float:
    low, high = (float(value) for value in torch.aminmax(tensor))  # NaN wins over every number
    largest = max(abs(low), abs(high))
    if not math.isfinite(largest):
        _refuse("non_finite", f"{name} has NaN or infinite values")
    return largest


def _range_warnings(largest: float) -> tuple[str, ...]:
    if largest <= MAX_FLOAT16:
        return ()
    return (f"magnitudes up to {largest:.4g} become infinite when the engine runs in float16 (limit 65504)",)


def _norm_warnings(kind: Kind, tensor: torch.Tensor, base: BaseInfo) -> tuple[str, ...]:
    """Hints at a prompt of another base, or one that training never moved, or blew up."""
    if kind != "embedding" or not base.embedding_norm:
        return ()
    ratio = float(tensor.norm(dim=1).median()) / base.embedding_norm
    if 1 / MAX_NORM_RATIO <= ratio <= MAX_NORM_RATIO:
        return ()
    return (f"the virtual tokens' median norm is {ratio:.3g} times that of the base model's embeddings",)


def _base_warnings(config: AdapterConfig, manifest: ManifestInput, base: BaseInfo) -> tuple[str, ...]:
    """Hints at another base of the same shape. A fingerprint decides; without one, names and layers do."""
    reference = manifest.base
    if reference is not None and reference.fingerprint is not None:
        if reference.fingerprint == base.fingerprint:
            return ()
        trained = f"trained on a base with fingerprint {shorten(reference.fingerprint, 80)}"
        return (f"{MANIFEST_FILE}: {trained}, served on {base.fingerprint}",)
    served = _last_component(base.name)
    names = [(CONFIG_FILE, config.base_model_name_or_path), (MANIFEST_FILE, reference and reference.name)]
    found = [
        f"{file}: trained on {shorten(_last_component(name))}, served on {served}"
        for file, name in names
        if name and _last_component(name).casefold() != served.casefold()
    ]
    if config.num_layers not in (None, base.num_layers):
        found.append(f"{CONFIG_FILE}: trained on {config.num_layers} layers, served on {base.num_layers}")
    return tuple(found)


def _last_component(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2]
