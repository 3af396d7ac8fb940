"""Multitask prompt tuning (Wang et al. 2023, arXiv:2303.02861): one prompt times a low-rank matrix for each task.

Without the distillation from single-task prompts that the paper adds.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import MultitaskPromptTuningConfig
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding
from torch import Tensor

from app.train.methods.method import Group, Method, Setup, on_cpu

# A change of a factor by some part changes the prompt by as much; the rate is for moving a prompt by parts of itself.
_FACTORS = 0.3


class MultitaskPromptTuning(Method):
    def __init__(self, setup: Setup) -> None:
        super().__init__()
        start = setup.embeddings()
        config = self.config = MultitaskPromptTuningConfig(
            num_virtual_tokens=len(start),
            num_tasks=len(setup.tasks),
            num_ranks=setup.recipe.num_ranks,
            **setup.dimensions(),
        )
        words = setup.model.get_input_embeddings()
        self.encoder: Any = setup.seeded(lambda: MultitaskPromptEmbedding(config, words))
        self.rms = setup.rms
        with torch.no_grad():
            self.encoder.embedding.weight.copy_(start)
            # PEFT draws both factors with deviation 0.02, and their product makes next to nothing of the prompt.
            # Here every product begins as ones, so each task begins at the shared prompt.
            self.encoder.prefix_task_cols[..., 0] = 1.0
            self.encoder.prefix_task_rows.zero_()
            self.encoder.prefix_task_rows[:, 0] = 1.0

    def prompt(self) -> Tensor:
        """[tasks, n, hidden]"""
        encoder = self.encoder
        shared: Tensor = encoder.embedding.weight
        factor: Tensor = encoder.prefix_task_cols @ encoder.prefix_task_rows
        return shared * factor

    def groups(self) -> list[Group]:
        encoder = self.encoder
        factors = [encoder.prefix_task_cols, encoder.prefix_task_rows]
        return [Group([encoder.embedding.weight], self.rms), Group(factors, _FACTORS)]

    def tensors(self) -> dict[str, Tensor]:
        encoder = self.encoder
        found = {
            "prompt_embeddings": encoder.embedding.weight,
            "prefix_task_cols": encoder.prefix_task_cols,
            "prefix_task_rows": encoder.prefix_task_rows,
        }
        return {name: on_cpu(tensor) for name, tensor in found.items()}
