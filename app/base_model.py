"""The frozen base model: loaded, checked for what the engine relies on, frozen and fingerprinted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from app.errors import InvalidBaseModel
from app.fingerprint import model_fingerprint, remember
from app.model_source import base_name, fetch_base_model, quiet
from app.soft_prompt import BaseInfo

__all__ = ["BaseModel", "describe", "fetch_base_model", "load_base_model", "pick_device", "pick_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, eq=False)
class BaseModel:
    """One base model in memory. No parameter takes gradients and nothing in the product writes to one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: BaseInfo
    eos_token_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    path: Path  # the transformers folder it was read from


def load_base_model(
    source: str,
    *,
    cache_dir: Path,
    device: str = "auto",
    dtype: str = "auto",
    max_model_len: int | None = None,
) -> BaseModel:
    """Load the model that `source` names (see `fetch_base_model`), fetching it first where needed.

    `device` is "auto", "cpu", "mps", "cuda" or "cuda:<n>"; `dtype` is "auto", "float32", "bfloat16" or
    "float16"; `max_model_len` lowers the model's own number of positions. Raises InvalidBaseModel for a
    source that cannot be had or read, and for a model that cannot be served behind key/value prefixes.
    """
    target = pick_device(device)
    chosen = pick_dtype(dtype, target)
    with quiet():
        path = fetch_base_model(source, cache_dir=cache_dir)
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
            _require_causal_attention(config)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
            model = _load_weights(path, config, chosen)
            model.to(target)  # type: ignore[arg-type]  # a wrapped method that mypy takes for a function
            files = [file for file in path.iterdir() if file.is_file()]
            fingerprint = remember(cache_dir / "digests", files, lambda: model_fingerprint(path, config, tokenizer))
        except InvalidBaseModel:
            raise
        except Exception as error:  # whatever a broken folder raises in the parsers
            raise InvalidBaseModel(f"cannot load the base model {source!r}: {error}") from error
        model.requires_grad_(False)
        info = describe(model, name=base_name(source), fingerprint=fingerprint, max_model_len=max_model_len)
    return BaseModel(model, tokenizer, info, _eos_token_ids(model, tokenizer), target, chosen, path)


def pick_device(device: str) -> torch.device:
    """Raises InvalidBaseModel for a device that is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InvalidBaseModel(f"device {device!r} is not one of auto, cpu, mps, cuda, cuda:<n>") from None
    there = available.get(chosen.type, False)
    if not there or (chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()):
        raise InvalidBaseModel(f"there is no device {device!r} on this machine")
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype to run in; "auto" goes by what the device is fast at."""
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise InvalidBaseModel(f"dtype {dtype!r} is not one of auto, {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    # NOTE: bfloat16 is a hundred times slower than float32 on a CPU without AMX or AVX-512.
    return torch.float16 if device.type == "mps" else torch.float32


@torch.inference_mode()
def describe(model: PreTrainedModel, *, name: str, fingerprint: str, max_model_len: int | None = None) -> BaseInfo:
    """Dimensions as a forward pass shows them; raises InvalidBaseModel if the engine cannot serve it.

    Two rows that differ in the last token only go through as embeddings. They must agree on every earlier
    position (causality, on which the whole idea of a prefix rests) and leave one pair of keys and values of
    one shape per layer.
    """
    config = model.config.get_text_config()
    architecture = type(model).__name__
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=model.device)
    try:
        embeddings = model.get_input_embeddings()(ids)
        output = model(inputs_embeds=embeddings, use_cache=True)
        pairs = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        shapes = {tuple(tensor.shape) for pair in pairs for tensor in pair}
    except Exception as error:  # whatever an architecture raises that does not keep plain keys and values
        raise InvalidBaseModel(
            f"{architecture} does not take embeddings and keep a key/value cache: {error}"
        ) from error
    if len(pairs) != config.num_hidden_layers or len(shapes) != 1:
        raise InvalidBaseModel(f"{architecture} keeps keys and values of different shapes: {sorted(shapes)}")
    first, second = output.logits[:, :-1].float()
    if not torch.allclose(first, second, rtol=0.0, atol=0.05 * float(first.std())):
        raise InvalidBaseModel(f"{architecture} is not causal: a token changes what stands before it")
    _, num_kv_heads, _, head_dim = shapes.pop()
    positions = [n for n in (getattr(config, "max_position_embeddings", None), max_model_len) if n is not None]
    if not positions:
        raise InvalidBaseModel(f"{architecture} names no context length: set SOFTPROMPT_MAX_MODEL_LEN")
    _require_fixed_rotation(config, architecture, min(positions))
    return BaseInfo(
        name=name,
        fingerprint=fingerprint,
        architecture=architecture,
        hidden_size=int(embeddings.shape[-1]),
        num_layers=len(pairs),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=int(config.vocab_size),
        max_model_len=min(positions),
        embedding_norm=_embedding_norm(model, int(config.vocab_size)),
    )


def _embedding_norm(model: PreTrainedModel, vocab_size: int) -> float:
    """Of about a thousand tokens, through the module: some scale what stands in the table."""
    ids = torch.arange(0, vocab_size, max(1, vocab_size // 1024), device=model.device)
    return round(float(model.get_input_embeddings()(ids).float().norm(dim=1).median()), 4)


def _require_causal_attention(config: PreTrainedConfig) -> None:
    """The cheap checks, before gigabytes are read; `describe` has the thorough one."""
    kind = config.model_type
    if config.is_encoder_decoder:
        raise InvalidBaseModel(f"{kind} is an encoder-decoder model; a causal language model is needed")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InvalidBaseModel(f"{kind} is not a causal language model")
    other = set(getattr(config.get_text_config(), "layer_types", None) or ()) - _ATTENTION_LAYERS
    if other:
        raise InvalidBaseModel(f"{kind} has {', '.join(sorted(other))} layers, which keep no plain keys and values")


def _require_fixed_rotation(config: Any, architecture: str, max_model_len: int) -> None:
    """Some rotary scalings take other frequencies for the whole batch as soon as one text in it is long.

    A row would then depend on its neighbours, and keys that were computed before would no longer fit.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]  # one for each kind of layer
    for found in nested or [parameters]:
        kind = found.get("rope_type", "default")
        limit = found.get("original_max_position_embeddings") or config.max_position_embeddings
        if kind in ("dynamic", "longrope") and max_model_len > limit:
            raise InvalidBaseModel(
                f"{architecture} scales its rotary positions ({kind}) by the longest text of a batch beyond {limit} "
                f"positions: set SOFTPROMPT_MAX_MODEL_LEN to at most {limit}"
            )


def _load_weights(path: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    # NOTE: in transformers 5.16 sdpa drops a cap on attention scores without a word. None is sdpa if supported.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # typed as if it never gave a report
    model: PreTrainedModel
    model, report = from_pretrained(
        path,
        config=config,
        dtype=dtype,
        attn_implementation="eager" if capped else None,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # so that the report names them; they are refused below
        output_loading_info=True,
    )
    # transformers would fill these with random numbers and go on.
    missing = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if missing:
        raise InvalidBaseModel(
            f"the weights have {len(missing)} tensors of {type(model).__name__} missing or misshapen, e.g. {missing[0]}"
        )
    return model


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends an answer: configuration, generation configuration and tokenizer may differ."""
    named: Iterable[Any] = (
        model.config.get_text_config().eos_token_id,
        model.generation_config.eos_token_id if model.generation_config else None,
        tokenizer.eos_token_id,
    )
    lists = (ids if isinstance(ids, list) else [ids] for ids in named)
    return frozenset(int(i) for ids in lists for i in ids if i is not None)
