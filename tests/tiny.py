"""Tiny random base models: every architecture under test, in memory or in a folder."""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from app.base_model import BaseModel, load_base_model
from app.soft_prompt import BaseInfo, SoftPrompt

ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma2", "gemma3")
FAMILY = ("llama", "mistral", "qwen2", "qwen3")  # what the fused decoders cover
VOCAB_SIZE = 128
MAX_MODEL_LEN = 512
EOS, UNK = "<|end|>", "<|unk|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def _config(architecture: str) -> PreTrainedConfig:
    common = {
        "vocab_size": VOCAB_SIZE,
        "initializer_range": 0.4,  # far above a real one: near-ties would hide or fake differences
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if architecture == "gpt2":
        return GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=MAX_MODEL_LEN, **common)
    common |= {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_MODEL_LEN,
    }
    gemma = {
        "head_dim": 16,
        "tie_word_embeddings": False,  # tied and random, a Gemma only repeats its last token
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    match architecture:
        case "llama":
            return LlamaConfig(**common)
        case "mistral":
            return MistralConfig(**common, sliding_window=24)
        case "qwen2":
            return Qwen2Config(**common)
        case "qwen3":
            return Qwen3Config(**common, head_dim=8)
        case "gemma2":
            return Gemma2Config(**common, **gemma)
        case "gemma3":
            return Gemma3TextConfig(**common, **gemma)
    raise ValueError(f"no tiny {architecture}; there are {ARCHITECTURES} and {FAMILY}")


def tiny_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A frozen random model: hidden 32, 3 layers, 4 heads (2 for KV, gpt2 4) of 8 (gemma 16), 512 positions.

    The Gemma models have windows of 24 positions on the outer layers, Mistral on all; Gemma 2 caps its logits.
    """
    config = _config(architecture)
    attention = "eager" if architecture == "gemma2" else "sdpa"  # sdpa would ignore the cap
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        # Biases start at 0 and norms at their neutral value, where a model that forgot them looks right.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def tiny_info(model: PreTrainedModel) -> BaseInfo:
    """The dimensions as `tiny_model` fixes them, not as app.base_model reads them."""
    kind = model.config.model_type
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return BaseInfo(
        name=f"tiny-{kind.removesuffix('_text')}",
        fingerprint=f"sha256:{digest.hexdigest()}",
        architecture=type(model).__name__,
        hidden_size=32,
        num_layers=3,
        num_kv_heads=4 if kind == "gpt2" else 2,
        head_dim=16 if kind.startswith("gemma") else 8,
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over printable ASCII and the bytes of "é", "€" and "😀": 128 entries, id 0 ends.

    The few merges make it a real BPE: "the" is one token, and text need not split where a template does.
    """
    to_symbols = ByteLevel(add_prefix_space=False, use_regex=False)
    texts = [*map(chr, range(32, 127)), "\n", "\t", "é", "€", "😀"]
    symbols = dict.fromkeys(s for text in texts for s in to_symbols.pre_tokenize_str(text)[0][0])
    vocab = {token: i for i, token in enumerate([EOS, UNK, *symbols])}
    words = ("the", "ing", "and", "Ġpos", "Ġneg", "er", "es", "on", "re", "or", "st", "le", "en")
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab and len(vocab) < VOCAB_SIZE:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    assert len(vocab) == VOCAB_SIZE, len(vocab)
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=UNK))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def beginning_tokenizer(*, adds: bool = True) -> PreTrainedTokenizerFast:
    """One whose chat template begins with the token that begins a text, which it puts before every text by itself."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = EOS
    tokenizer.chat_template = EOS + CHAT_TEMPLATE
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{EOS} $A", special_tokens=[(EOS, tokenizer.bos_token_id)]
        )
    return tokenizer


def save_tiny(folder: Path, architecture: str, seed: int = 0) -> Path:
    """Write a folder that `load_base_model` takes."""
    tiny_model(architecture, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_gguf(path: Path, seed: int = 0) -> PreTrainedModel:
    """Write the tiny Llama and its tokenizer as a GGUF file; returns the model."""
    model, vocab = tiny_model("llama", seed), json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_context_length(MAX_MODEL_LEN)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(3)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocab["vocab"], key=vocab["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in vocab["merges"]])
    writer.add_eos_token_id(0)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        _, is_layer, rest = stem.partition("model.layers.")
        number, _, layer_stem = rest.partition(".")
        stored = f"blk.{number}.{names[layer_stem]}" if is_layer else names[stem]
        if stored.endswith(("attn_q", "attn_k")):  # GGUF has the two halves of a rotary pair side by side
            tensor = tensor.reshape(-1, 2, 4, 32).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{stored}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@cache
def tiny_base(architecture: str) -> BaseModel:
    """The tiny model, loaded from a folder as a real one is. Shared by all tests of a run: it is frozen."""
    home = Path(tempfile.mkdtemp(prefix="softprompt-tiny-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    folder = save_tiny(home / f"tiny-{architecture}", architecture)
    return load_base_model(str(folder), cache_dir=home / "cache", device="cpu")


def random_prompt(seed: int, length: int = 7) -> SoftPrompt:
    tensor = torch.randn(length, 32, generator=torch.Generator().manual_seed(seed))
    return SoftPrompt("embedding", tensor, digest=f"sha256:{seed}")
