"""What a running training knows, and its one-file checkpoint: whole or absent, and never a pickle."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

_FILE = "state.safetensors"
_TENSORS = ("method", "average", "exp_avg", "exp_avg_sq", "best")  # groups of tensors, "<group>:<name>" in the file


@dataclass
class Progressed:
    """The state between two steps; tensors are float32 on the CPU, by name."""

    method: dict[str, Tensor]  # its state_dict
    best: dict[str, Tensor]  # the tensors of the PEFT file with the least validation loss
    average: dict[str, Tensor] = field(default_factory=dict)  # over steps, by parameter
    exp_avg: dict[str, Tensor] = field(default_factory=dict)  # AdamW's two moments, by parameter
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    planned_steps: int | None = None  # what the budget has room for, once that is known
    best_step: int = 0  # the start
    best_loss: float = float("inf")
    stale: int = 0  # evaluations since the best
    trained_tokens: int = 0
    seconds: float = 0.0
    start_seconds: float = 0.0  # of them, those that validating the start took
    losses: list[float] = field(default_factory=list)  # training losses since the last evaluation
    curve: list[dict[str, float]] = field(default_factory=list)

    def note(self, validation_loss: float, tensors: dict[str, Tensor]) -> None:
        """Record an evaluation and keep the prompt, as its file has it, if it is the best yet."""
        trained = {"train_loss": sum(self.losses) / len(self.losses)} if self.losses else {}
        self.curve.append({"step": self.step, **trained, "validation_loss": validation_loss})
        self.losses = []
        self.stale += 1
        if validation_loss < self.best_loss:
            self.best_loss, self.best_step, self.stale = validation_loss, self.step, 0
            self.best = tensors


def save_checkpoint(folder: Path, identity: str, state: Progressed) -> None:
    """Replace the checkpoint in one rename; a kill at any moment leaves the old or the new one."""
    numbers = {k: v for k, v in vars(state).items() if k not in _TENSORS}
    tensors = {f"{group}:{name}": tensor for group in _TENSORS for name, tensor in getattr(state, group).items()}
    data = save(tensors, metadata={"identity": identity, "state": json.dumps(numbers)})
    temporary = folder / (_FILE + ".new")
    temporary.write_bytes(data)
    sync(temporary)
    os.replace(temporary, folder / _FILE)
    sync(folder)


def load_checkpoint(folder: Path, identity: str) -> Progressed | None:
    """The checkpoint of this very run, or None if there is none, or another run's, or a broken one."""
    path = folder / _FILE
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("identity") != identity:
            return None
        members: dict[str, Any] = {group: {} for group in _TENSORS} | json.loads(metadata["state"])
        for key, tensor in load(path.read_bytes()).items():
            group, _, name = key.partition(":")
            members[group][name] = tensor
        if members.keys() != {each.name for each in fields(Progressed)}:
            return None
        return Progressed(**members)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        return None


def sync(path: Path) -> None:
    """fsync a file or a folder, so that a rename after it cannot outlive its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
