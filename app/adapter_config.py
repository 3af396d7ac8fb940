"""adapter_config.json of a prompt-learning checkpoint, read without PEFT.

PEFT's own configuration classes can import modules, run code from a repository and open local files
(`auto_mapping`, `tokenizer_kwargs`, `prompt_tuning_init_state_dict_path`), so none is built from an upload.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.errors import InvalidPromptFile
from app.soft_prompt import BaseInfo
from app.strict_json import parse_object, shorten

EMBEDDING_TYPES = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
KV_TYPES = ("PREFIX_TUNING", "CARTRIDGE")

# Keys that PEFT writes for these types and that say how a prompt was trained, not what it is.
_TRAINING_KEYS = frozenset(
    """
    peft_version revision inference_mode tokenizer_name_or_path
    prompt_tuning_init prompt_tuning_init_text prompt_tuning_init_task
    encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout
    init_weights prefix_projection num_frozen_tokens
    cpt_token_ids cpt_mask cpt_tokens_type_mask
    opt_weighted_loss_type opt_loss_decay_factor opt_projection_epsilon opt_projection_format_epsilon
    """.split()
)
_NAMED_IN_WARNING = 10

Count = Annotated[int, Field(ge=1)]


class AdapterConfig(BaseModel):
    """The keys that matter; PEFT leaves most of them null until a base model is known."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    num_virtual_tokens: Count
    token_dim: Count | None = None  # hidden size, or KV heads x head_dim for the KV types
    num_layers: Count | None = None
    num_attention_heads: Count | None = None  # KV heads for the KV types
    num_transformer_submodules: int | None = None
    num_tasks: Count | None = None
    num_ranks: Count | None = None


def read_config(data: bytes, *, max_bytes: int) -> tuple[AdapterConfig, tuple[str, ...]]:
    """Return the configuration and a warning about keys that were set but have no effect here.

    Raises InvalidPromptFile with code config_too_large, invalid_config, unsupported_peft_type,
    unsupported_task_type or unsupported_submodules.
    """
    if len(data) > max_bytes:
        raise _invalid("config_too_large", f"the file has {len(data)} bytes but may have {max_bytes}")
    try:
        raw = parse_object(data)
    except ValueError as error:
        raise _invalid("invalid_config", f"the file is not strict JSON: {error}") from None
    # Before the other keys, which other types do not have.
    if raw.get("peft_type") not in EMBEDDING_TYPES + KV_TYPES:
        supported = ", ".join(EMBEDDING_TYPES + KV_TYPES)
        found = shorten(raw.get("peft_type"))
        raise _invalid("unsupported_peft_type", f"peft_type is {found} but must be one of {supported}")
    try:
        config = AdapterConfig.model_validate(raw)
    except ValidationError as error:
        raise _invalid("invalid_config", describe(error)) from None
    if config.task_type not in (None, "CAUSAL_LM"):
        raise _invalid("unsupported_task_type", f"task_type is {shorten(config.task_type)} but must be CAUSAL_LM")
    if config.num_transformer_submodules not in (None, 1):
        found = str(config.num_transformer_submodules)
        raise _invalid("unsupported_submodules", f"num_transformer_submodules is {found} but must be 1")
    known = _TRAINING_KEYS | AdapterConfig.model_fields.keys()
    unused = sorted(shorten(key) for key, value in raw.items() if value is not None and key not in known)
    return config, _unused_warning(unused)


def check_dimensions(config: AdapterConfig, base: BaseInfo, *, max_virtual_tokens: int) -> None:
    """What the configuration says of the base model it was trained on; null says nothing.

    Raises InvalidPromptFile with code too_many_virtual_tokens, hidden_size_mismatch, layer_count_mismatch,
    kv_heads_mismatch or head_dim_mismatch.
    """
    # The text and the answer need a position each.
    limit = min(max_virtual_tokens, base.max_model_len - 2)
    if config.num_virtual_tokens > limit:
        found = f"num_virtual_tokens is {config.num_virtual_tokens} but may be at most {limit}"
        raise _invalid("too_many_virtual_tokens", found)
    checks = [("hidden_size_mismatch", "token_dim", config.token_dim, base.hidden_size)]
    if config.peft_type in KV_TYPES:
        checks = [
            ("layer_count_mismatch", "num_layers", config.num_layers, base.num_layers),
            ("kv_heads_mismatch", "num_attention_heads", config.num_attention_heads, base.num_kv_heads),
            ("head_dim_mismatch", "token_dim", config.token_dim, base.num_kv_heads * base.head_dim),
        ]
    for code, key, value, expected in checks:
        if value is not None and value != expected:
            raise _invalid(code, f"{key} is {value} but the base model needs {expected}")


def describe(error: ValidationError) -> str:
    """The first complaint, without the input."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "extra_forbidden":
        return f"unknown key {shorten('.'.join(map(str, first['loc'])))}"
    return f"{shorten('.'.join(map(str, first['loc'])))}: {first['msg']}"


def _unused_warning(keys: list[str]) -> tuple[str, ...]:
    if not keys:
        return ()
    named = ", ".join(keys[:_NAMED_IN_WARNING])
    more = f" and {len(keys) - _NAMED_IN_WARNING} more" if len(keys) > _NAMED_IN_WARNING else ""
    return (f"adapter_config.json: {named}{more} have no effect here",)


def _invalid(code: str, message: str) -> InvalidPromptFile:
    return InvalidPromptFile(f"adapter_config.json: {message}", param="adapter_config", code=code)
