"""Which models the fused decoders take: only those in which nothing is other than the architecture has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from app.engine.weights import FAMILY as CLASSES
from app.engine.weights import decoder_weights
from tests.tiny import ARCHITECTURES, FAMILY, MAX_MODEL_LEN, tiny_model


class QuantLinear(nn.Module):
    """As GPTQ has it: no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", linear.weight.to(torch.int8))
        self.bias = None


class ScaledLinear(nn.Linear):
    pass


class ScaledEmbedding(nn.Embedding):
    pass


def replace_module(name: str, make: Callable[[Any], nn.Module]) -> Callable[[Any], Any]:
    def change(model: Any) -> None:
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, child, make(getattr(module, child)))

    return change


def scaled(linear: nn.Linear) -> nn.Module:
    found = ScaledLinear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    found.load_state_dict(linear.state_dict())
    return found


def smaller(linear: nn.Linear) -> nn.Module:
    return nn.Linear(linear.in_features, linear.out_features - 8, bias=linear.bias is not None)


def set_config(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda model: setattr(model.config, name, value)


def lora(target: str) -> Callable[[Any], Any]:
    return lambda model: inject_adapter_in_model(LoraConfig(target_modules=[target]), model)


PROJECTIONS = [
    *(f"model.layers.2.self_attn.{name}_proj" for name in "qkvo"),
    *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
    "lm_head",
]
VARIANTS: dict[str, Callable[[Any], Any]] = {
    **{f"LoRA on {name.split('.')[-1]}": lora(name.split(".")[-1]) for name in PROJECTIONS},
    **{f"LoRA on {name}": lora(name) for name in ("embed_tokens",)},
    **{f"GPTQ {name}": replace_module(name, QuantLinear) for name in PROJECTIONS},
    **{f"subclass {name}": replace_module(name, scaled) for name in PROJECTIONS},
    **{f"smaller {name}": replace_module(name, smaller) for name in PROJECTIONS},
    "subclass of the embedding": replace_module(
        "model.embed_tokens", lambda e: ScaledEmbedding(e.num_embeddings, e.embedding_dim)
    ),
    "another norm": replace_module("model.layers.1.input_layernorm", lambda _: nn.RMSNorm(32)),
    "a wrapped MLP": replace_module("model.layers.1.mlp", nn.Sequential),
    "embedding resized alone": lambda m: m.set_input_embeddings(nn.Embedding(136, 32)),
    "head resized alone": lambda m: m.set_output_embeddings(nn.Linear(32, 136, bias=False)),
    "vocabulary resized, not the config": lambda m: (m.resize_token_embeddings(136), set_config("vocab_size", 128)(m)),
    "a layer missing": lambda m: m.model.layers.__delitem__(2),
    "one matrix in half": lambda m: m.model.layers[1].mlp.up_proj.half(),
    "one norm in double": lambda m: m.model.norm.double(),
    "float8": lambda m: [setattr(p, "data", p.data.to(torch.float8_e4m3fn)) for p in m.parameters()],
    "one matrix elsewhere": lambda m: m.model.layers[1].mlp.up_proj.to("meta"),
    "everything elsewhere": lambda m: m.to("meta"),
    "quantized by its config": set_config("quantization_config", {"quant_method": "fp8"}),
    "quantized by transformers": lambda m: setattr(m, "hf_quantizer", object()),
    "another activation": set_config("hidden_act", "gelu"),
    "frequencies by length": set_config("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_variants_are_left_to_the_models_own_forward(architecture: str, variant: str) -> None:
    model = tiny_model(architecture)
    assert decoder_weights(model, MAX_MODEL_LEN) is not None
    VARIANTS[variant](model)
    assert decoder_weights(model, MAX_MODEL_LEN) is None


def test_peft_models_are_left_to_their_own_forward() -> None:
    assert decoder_weights(get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])), 512) is None


def test_a_model_that_turns_a_part_of_each_head_only() -> None:
    model = tiny_model("llama")
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq[:2]
    assert decoder_weights(model, MAX_MODEL_LEN) is None


def test_a_class_of_the_same_name_from_elsewhere() -> None:
    model = tiny_model("llama")
    model.__class__ = type("LlamaForCausalLM", (type(model),), {"__module__": "transformers_modules.remote"})
    assert type(model).__name__ in CLASSES
    assert decoder_weights(model, MAX_MODEL_LEN) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES, *FAMILY}))
def test_the_family_is_taken_in_any_dtype(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture).to(dtype)
    weights = decoder_weights(model, MAX_MODEL_LEN)
    assert (weights is not None) == (architecture in FAMILY)


def test_a_vocabulary_resized_as_a_whole_is_taken() -> None:
    model = tiny_model("qwen2")
    model.resize_token_embeddings(136)
    weights = decoder_weights(model, MAX_MODEL_LEN)
    assert weights is not None and len(weights.embedding) == len(weights.lm_head) == 136
