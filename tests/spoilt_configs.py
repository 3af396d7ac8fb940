"""Ways to spoil an adapter_config.json, and the manifest's task_id."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from tests.prompt_drafts import PEFT_TYPES, Draft
from tests.spoilt_drafts import NAMES, odd

_LOCATIONS = (
    "/etc/passwd",
    "http://169.254.169.254/",
    "file:///etc/shadow",
    "\\\\host\\share",
    "s3://b/k",
    "~/.ssh/id_rsa",
)
_DANGEROUS: dict[str, tuple[Any, ...]] = {
    "auto_mapping": ({"base_model_class": "os", "parent_library": "os"}, "os.system"),
    "tokenizer_kwargs": ({"trust_remote_code": True},),
    "prompt_tuning_init_state_dict_path": _LOCATIONS,
    "tokenizer_name_or_path": _LOCATIONS,
    "base_model_name_or_path": (*_LOCATIONS, "other/base", "x" * 300),
    "revision": ("../..", "main\x00"),
    "megatron_config": ({}, {"a": 1}),
    "modules_to_save": (["lm_head"], "all"),
    "trust_remote_code": (True,),
    "_target_": ("os.system",),
    "__class__": ("x",),
    "__proto__": ({"a": 1},),
}
_COUNTS = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
_PEFT_TYPES = (
    *PEFT_TYPES,
    "LORA",
    "IA3",
    "ADALORA",
    "OFT",
    "ADAPTION_PROMPT",
    "prompt_tuning",
    "PROMPT_TUNING\x00",
    "PeftType.LORA",
)


def _config_type(rng: Random, draft: Draft) -> None:
    draft.config["peft_type"] = rng.choice(_PEFT_TYPES) if rng.random() < 0.8 else odd(rng)


def _config_count(rng: Random, draft: Draft) -> None:
    key = rng.choice((*_COUNTS, "num_tasks", "num_ranks"))
    numbers = (1, 2, 3, 8, 16, 62, 63, 64, 8192, 10**9, 2**31, 2**63, -1, 0, 32)
    draft.config[key] = rng.choice(numbers) if rng.random() < 0.6 else odd(rng)


def _config_dangerous(rng: Random, draft: Draft) -> None:
    for key in rng.sample(sorted(_DANGEROUS), rng.randint(1, 4)):
        draft.config[key] = rng.choice(_DANGEROUS[key])


def _config_key(rng: Random, draft: Draft) -> None:
    key = (
        rng.choice(sorted(draft.config)) if rng.random() < 0.6 else rng.choice(("task_type", "base_model_name_or_path"))
    )
    if rng.random() < 0.3:
        draft.config.pop(key, None)
    else:
        draft.config[key] = odd(rng)


def _config_unknown(rng: Random, draft: Draft) -> None:
    for index in range(rng.choice((1, 3, 30, 1500))):
        draft.config[rng.choice(NAMES) + str(index)] = odd(rng)


def _config_task_type(rng: Random, draft: Draft) -> None:
    draft.config["task_type"] = rng.choice(
        ("SEQ_CLS", "SEQ_2_SEQ_LM", "causal_lm", "TaskType.CAUSAL_LM", "CAUSAL_LM", None)
    )


def _task_id(rng: Random, draft: Draft) -> None:
    draft.task_id = rng.choice((1, 2, 3, 2**31, 2**63))


CONFIGS: dict[str, Callable[[Random, Draft], None]] = {
    "config type": _config_type,
    "config count": _config_count,
    "config dangerous": _config_dangerous,
    "config key": _config_key,
    "config unknown": _config_unknown,
    "config task type": _config_task_type,
    "task id": _task_id,
}
