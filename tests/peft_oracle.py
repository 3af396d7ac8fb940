"""PEFT, alone at batch 1 without padding, as the judge of what a soft prompt does."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
from transformers import PreTrainedModel

from app.checkpoint import Checkpoint, read_checkpoint
from app.manifest import ManifestInput
from app.soft_prompt import BaseInfo

PEFT_TYPES = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "PREFIX_TUNING", "CARTRIDGE")
NUM_TASKS = 3


def task_id(peft_type: str, number: int) -> int:
    """Only a multitask checkpoint has more than one task to pick from."""
    return number % NUM_TASKS if peft_type == "MULTITASK_PROMPT_TUNING" else 0


def peft_config(peft_type: str, num_virtual_tokens: int, vocab_size: int) -> peft.PeftConfig:
    n, common = num_virtual_tokens, {"task_type": "CAUSAL_LM", "num_virtual_tokens": num_virtual_tokens}
    match peft_type:
        case "PROMPT_TUNING":
            return peft.PromptTuningConfig(**common)
        case "P_TUNING":
            return peft.PromptEncoderConfig(**common, encoder_hidden_size=16)
        case "MULTITASK_PROMPT_TUNING":
            return peft.MultitaskPromptTuningConfig(**common, num_tasks=NUM_TASKS, num_ranks=2)
        case "CPT":
            return peft.CPTConfig(
                task_type="CAUSAL_LM",
                cpt_token_ids=[i % vocab_size for i in range(n)],
                cpt_mask=[1] * n,
                cpt_tokens_type_mask=[1] * n,
            )
        case "PREFIX_TUNING":
            return peft.PrefixTuningConfig(**common)
        case "CARTRIDGE":
            return peft.CartridgeConfig(**common)
    raise ValueError(peft_type)


def save_adapter(base: PreTrainedModel, folder: Path, peft_type: str, num_virtual_tokens: int, seed: int) -> Path:
    """A randomised adapter, written by PEFT's own `save_pretrained`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, peft_config(peft_type, num_virtual_tokens, base.config.vocab_size))
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.7)
    with patch.object(peft.PeftModel, "create_or_update_model_card"):  # takes longer than all the rest
        model.save_pretrained(folder)
    base.requires_grad_(False)
    return folder


def read_folder(folder: Path, info: BaseInfo, task: int = 0) -> Checkpoint:
    config = (folder / "adapter_config.json").read_bytes()
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    return read_checkpoint(config, tensors, ManifestInput(task_id=task), info)


@lru_cache(maxsize=16)
def _load(base: PreTrainedModel, folder: Path) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(base, folder).eval()


@torch.inference_mode()
def oracle_logits(base: PreTrainedModel, folder: Path | None, token_ids: list[int], task: int = 0) -> torch.Tensor:
    """[len(token_ids), vocab_size]: one forward over the whole text, without a cache of ours."""
    inputs: dict[str, Any] = {"input_ids": torch.tensor([token_ids])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if folder is None:
        return base(**inputs, use_cache=False).logits[0]
    model = _load(base, folder)
    if model.active_peft_config.peft_type == "MULTITASK_PROMPT_TUNING":
        inputs["task_ids"] = torch.tensor([task])
    return model(**inputs).logits[0, -len(token_ids) :]


@torch.inference_mode()
def oracle_generate(
    base: PreTrainedModel, folder: Path, token_ids: list[int], max_new_tokens: int, task: int = 0
) -> list[int]:
    model = _load(base, folder)
    extra = {}
    if model.active_peft_config.peft_type == "MULTITASK_PROMPT_TUNING":
        extra["task_ids"] = torch.tensor([task])
    input_ids = torch.tensor([token_ids])
    out = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **extra,
    )
    return out[0, len(token_ids) :].tolist()
