"""What a running training knows, and its one-file checkpoint: whole or absent, and never a pickle."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

_FILE = "state.safetensors"
_TENSORS = ("prompt", "best_prompt", "exp_avg", "exp_avg_sq")


@dataclass
class Progressed:
    """The state between two steps; tensors are [virtual tokens, hidden] float32 on the CPU."""

    prompt: Tensor
    best_prompt: Tensor
    exp_avg: Tensor  # AdamW's two moments
    exp_avg_sq: Tensor
    step: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    stale: int = 0  # evaluations since the best
    trained_tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # training losses since the last evaluation
    curve: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def start(cls, prompt: Tensor) -> Progressed:
        """Nothing done yet; the best prompt so far is the initial one."""
        first = _copy(prompt)
        return cls(first, first, torch.zeros_like(first), torch.zeros_like(first))

    def note(self, validation_loss: float, prompt: Tensor) -> None:
        """Record an evaluation and keep the prompt if it is the best yet."""
        mean = sum(self.losses) / len(self.losses)
        self.curve.append({"step": self.step, "train_loss": mean, "validation_loss": validation_loss})
        self.losses = []
        self.stale += 1
        if validation_loss < self.best_loss:
            self.best_loss, self.best_step, self.stale = validation_loss, self.step, 0
            self.best_prompt = _copy(prompt)

    def keep(self, prompt: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Take the tensors over from the optimizer, before a checkpoint."""
        self.prompt, self.exp_avg, self.exp_avg_sq = map(_copy, (prompt, exp_avg, exp_avg_sq))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def save_checkpoint(folder: Path, identity: str, state: Progressed) -> None:
    """Replace the checkpoint in one rename; a kill at any moment leaves the old or the new one."""
    numbers = {k: v for k, v in vars(state).items() if k not in _TENSORS}
    data = save(
        {name: getattr(state, name).contiguous() for name in _TENSORS},
        metadata={"identity": identity, "state": json.dumps(numbers)},
    )
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
        members: dict[str, Any] = {**load(path.read_bytes()), **json.loads(metadata["state"])}
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
