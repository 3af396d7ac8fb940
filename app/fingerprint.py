"""The identity of a base model: one digest over its configuration, tokenizer and weights.

It says whether a soft prompt was trained on this very model, so it must not depend on what leaves the model
as it is: the folder, the sharding of the files, the dtype the server runs it in, the version of a library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from app.errors import InvalidBaseModel

# Where a configuration says nothing about what the model computes.
_NOISE = {
    "_name_or_path",
    "_model_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def model_fingerprint(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of the model in a transformers folder, "sha256:<hex>".

    Reads every weight once, in the dtype of the file: about a second per GB. Raises InvalidBaseModel.
    """
    digest = hashlib.sha256()
    for part in (_canonical_config(config), _canonical_tokenizer(tokenizer)):
        digest.update(_frame(part))
    places = _weight_places(folder)
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in set(places.values())}
        for name, file in sorted(places.items()):
            tensor: torch.Tensor = opened[file].get_tensor(name).contiguous()
            digest.update(_frame(f"{name} {tensor.dtype} {list(tensor.shape)}".encode()))
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remember(memory: Path, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """`compute()`, or what it gave last time if no file has changed its size or modification time since.

    `memory` is a folder for the answers. One that cannot be written only costs the time to compute again.
    """
    state = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)]
    key = hashlib.sha256(json.dumps([path for path, _, _ in state]).encode()).hexdigest()
    note = memory / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_bytes())
        if known["files"] == state:
            return str(known["digest"])
    digest = compute()
    with contextlib.suppress(OSError):
        memory.mkdir(parents=True, exist_ok=True)
        draft = note.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"files": state, "digest": digest}), encoding="utf-8")
        draft.replace(note)
    return digest


def _frame(part: bytes) -> bytes:
    """Length first, so that no two sequences of parts run together to the same bytes."""
    return len(part).to_bytes(8, "little") + part


def _canonical_config(config: PreTrainedConfig) -> bytes:
    """What differs from the class's defaults, so that a new field in a new transformers changes nothing."""
    try:
        defaults: Mapping[str, Any] = type(config)().to_dict()
    except (TypeError, ValueError):  # a class that cannot be made without arguments
        defaults = {}
    own = {k: v for k, v in config.to_dict().items() if k == "model_type" or v != defaults.get(k)}
    return _canonical_json(_without_noise(own))


def _without_noise(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _without_noise(v) for k, v in value.items() if k not in _NOISE}
    return value


def _canonical_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InvalidBaseModel("the base model's tokenizer has no fast version (tokenizer.json)")
    content = json.loads(backend.to_str())
    for setting in ("padding", "truncation"):  # set by calls, not by the model
        content.pop(setting, None)
    return _canonical_json({"tokenizer": content, "chat_template": tokenizer.chat_template})


def _canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def _weight_places(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / "model.safetensors")
