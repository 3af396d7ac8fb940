"""The weights of a Llama-family model as a fused decoder wants them, taken from the loaded transformers model.

Covers Llama, Mistral, Qwen2 and Qwen3: RMS norm before attention and before a gated SiLU MLP, rotary positions,
grouped-query attention; with or without biases, per-head norms of queries and keys, and sliding windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Exact classes: a subclass may compute something else.
FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Beside the architecture's own modules. Exact as well: adapters and quantized weights are subclasses or others.
_MODULES = (torch.nn.Linear, torch.nn.Embedding, torch.nn.ModuleList, torch.nn.SiLU)
# Rotary frequencies that depend on the length of each text have no table.
_TABLE_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One decoder layer. Matrices are [outputs, inputs], as in `torch.nn.Linear`; biases are None where there are none.

    `q`, `k`, `v` and `gate`, `up` read the same input, so a decoder may fuse them.
    """

    input_norm: torch.Tensor  # [hidden_size]
    q: torch.Tensor  # [num_heads * head_dim, hidden_size]
    k: torch.Tensor  # [num_kv_heads * head_dim, hidden_size]
    v: torch.Tensor  # [num_kv_heads * head_dim, hidden_size]
    q_bias: torch.Tensor | None
    k_bias: torch.Tensor | None
    v_bias: torch.Tensor | None
    q_norm: torch.Tensor | None  # [head_dim], Qwen3
    k_norm: torch.Tensor | None  # [head_dim], Qwen3
    o: torch.Tensor  # [hidden_size, num_heads * head_dim]
    o_bias: torch.Tensor | None
    mlp_norm: torch.Tensor  # [hidden_size]
    gate: torch.Tensor  # [intermediate_size, hidden_size]
    up: torch.Tensor  # [intermediate_size, hidden_size]
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    down: torch.Tensor  # [hidden_size, intermediate_size]
    down_bias: torch.Tensor | None
    window: int  # positions a query sees, itself included; 0: all


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """A whole model. Tensors are the model's own (no copies) except the rotary tables."""

    embedding: torch.Tensor  # [vocab_size, hidden_size]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden_size]
    lm_head: torch.Tensor  # [vocab_size, hidden_size]; the embedding itself where the model ties them
    lm_head_bias: torch.Tensor | None
    cos: torch.Tensor  # [max positions, head_dim / 2] float32; scaled as the model scales it
    sin: torch.Tensor  # [max positions, head_dim / 2] float32
    eps: float  # of every RMS norm
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    attention_scale: float


def decoder_weights(model: Any, max_model_len: int) -> DecoderWeights | None:
    """The weights of `model` for `max_model_len` positions.

    None if it is not of the family or anything in it is not as the architecture has it: adapters, quantized modules,
    several dtypes or devices, sizes that the config does not say.
    """
    config = model.config.get_text_config()
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if type(model).__name__ not in FAMILY or config.hidden_act != "silu" or rope_type not in _TABLE_ROPE_TYPES:
        return None
    if rope_type in ("yarn", "llama3", "linear") and max_model_len > config.max_position_embeddings:
        return None
    if not _has_plain_modules(model) or not _has_plain_parameters(model):
        return None
    body = model.model
    head_dim = body.layers[0].self_attn.head_dim
    tables = _rotary_tables(body.rotary_emb, max_model_len, head_dim, model.device)
    if tables is None:
        return None
    cos, sin = tables
    weights = DecoderWeights(
        embedding=body.embed_tokens.weight,
        layers=tuple(_layer(layer, config) for layer in body.layers),
        norm=body.norm.weight,
        lm_head=model.lm_head.weight,
        lm_head_bias=model.lm_head.bias,
        cos=cos,
        sin=sin,
        eps=float(config.rms_norm_eps),
        num_heads=int(config.num_attention_heads),
        num_kv_heads=int(config.num_key_value_heads),
        head_dim=int(head_dim),
        intermediate_size=int(config.intermediate_size),
        attention_scale=float(body.layers[0].self_attn.scaling),
    )
    if len(weights.layers) != config.num_hidden_layers or len(weights.embedding) != config.vocab_size:
        return None
    return weights if not wrong_shapes(weights, config.hidden_size) else None


def wrong_shapes(weights: DecoderWeights, hidden_size: int) -> list[str]:
    """Every tensor that has not the shape that the sizes of the model give it, with both shapes."""
    w = weights
    vocab_size, inner, dim = len(w.embedding), w.intermediate_size, w.head_dim
    heads, kv_heads = w.num_heads * dim, w.num_kv_heads * dim
    wrong: list[str] = []

    def expect(name: str, tensor: torch.Tensor | None, *shape: int) -> None:
        if tensor is not None and tensor.shape != shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, not {shape}")

    expect("embedding", w.embedding, vocab_size, hidden_size)
    expect("lm_head", w.lm_head, vocab_size, hidden_size)
    expect("lm_head_bias", w.lm_head_bias, vocab_size)
    expect("norm", w.norm, hidden_size)
    expect("cos", w.cos, len(w.cos), dim // 2)
    expect("sin", w.sin, len(w.cos), dim // 2)
    for i, layer in enumerate(w.layers):
        for names, outputs, inputs in (
            (("q",), heads, hidden_size),
            (("k", "v"), kv_heads, hidden_size),
            (("o",), hidden_size, heads),
            (("gate", "up"), inner, hidden_size),
            (("down",), hidden_size, inner),
        ):
            for name in names:
                expect(f"layer {i}: {name}", getattr(layer, name), outputs, inputs)
                expect(f"layer {i}: {name}_bias", getattr(layer, f"{name}_bias"), outputs)
        for name, size in (("input_norm", hidden_size), ("mlp_norm", hidden_size), ("q_norm", dim), ("k_norm", dim)):
            expect(f"layer {i}: {name}", getattr(layer, name), size)
    return wrong


def _has_plain_modules(model: Any) -> bool:
    if getattr(model.config, "quantization_config", None) or getattr(model, "hf_quantizer", None) is not None:
        return False
    own = (type(model).__module__, "transformers.activations")
    return own[0].startswith("transformers.models.") and all(
        type(module) in _MODULES or type(module).__module__ in own for module in model.modules()
    )


def _has_plain_parameters(model: Any) -> bool:
    kinds = {(parameter.dtype, parameter.device) for parameter in model.parameters()}
    dtype, device = kinds.pop()
    return not kinds and dtype in _DTYPES and device.type != "meta"


def _layer(layer: Any, config: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    # Mistral has one window for the whole model, Qwen one kind per layer.
    window = getattr(attention, "sliding_window", None)
    if window is None and type(attention).__name__ == "MistralAttention":
        window = getattr(config, "sliding_window", None)
    return LayerWeights(
        input_norm=layer.input_layernorm.weight,
        q=attention.q_proj.weight,
        k=attention.k_proj.weight,
        v=attention.v_proj.weight,
        q_bias=attention.q_proj.bias,
        k_bias=attention.k_proj.bias,
        v_bias=attention.v_proj.bias,
        q_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        o=attention.o_proj.weight,
        o_bias=attention.o_proj.bias,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate=mlp.gate_proj.weight,
        up=mlp.up_proj.weight,
        gate_bias=mlp.gate_proj.bias,
        up_bias=mlp.up_proj.bias,
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
        window=int(window or 0),
    )


@torch.inference_mode()
def _rotary_tables(
    rotary: Any, max_model_len: int, head_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The model's own rotary module, asked once for every position; None if it turns a part of each head only.

    The two halves of a head share their angles.
    """
    positions = torch.arange(max_model_len, device=device)[None]
    cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=device), positions)
    if cos.shape[-1] != head_dim:
        return None
    half = head_dim // 2
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()
