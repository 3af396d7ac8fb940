"""What the parts of gpu_check share: the report, the machine, and models made of random numbers."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from app.engine.attention_kernels import FLASH2_PAGE
from app.engine.decoder import FusedDecoder
from app.engine.kv_cache import KVCache
from app.engine.weights import decoder_weights
from app.soft_prompt import BaseInfo

FP32_TOLERANCE = 1e-3  # of logits, relative to the largest or 1
BF16_FACTOR = 1.5  # our error against transformers' own, both against float32
# (implementation, block size): FlashAttention-2 pages blocks of 256 only.
ATTENTION = (("reference", 16), ("flashinfer", 16), ("varlen", FLASH2_PAGE), ("triton", 16))


def worst(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The largest difference; infinite where something is not a number, and where there is nothing to compare.

    Python's `max` would pass over a NaN that does not come first.
    """
    differences = [(a.float() - b.float()).abs().nan_to_num(nan=torch.inf) for a, b in pairs]
    return max((float(each.max()) if each.numel() else torch.inf for each in differences), default=torch.inf)


def largest_logit(truth: Iterable[torch.Tensor]) -> float:
    """At least 1."""
    return max(1.0, worst((logits, torch.zeros_like(logits)) for logits in truth))


@dataclass
class Report:
    """Printed as it grows."""

    started: float = field(default_factory=time.monotonic)
    results: dict[str, Any] = field(default_factory=lambda: {"parity": [], "decode": [], "notes": []})
    failures: int = 0

    def line(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.1f}s] {text}", flush=True)

    def check(self, name: str, ok: bool, reason: str = "", **numbers: float) -> None:
        self.failures += not ok
        self.results["parity"].append({"name": name, "ok": ok, **({"reason": reason} if reason else {}), **numbers})
        shown = ", ".join([*([reason] if reason else []), *(f"{key} {value:.2e}" for key, value in numbers.items())])
        self.line(f"{'ok  ' if ok else 'FAIL'} {name}: {shown}")

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Whatever is raised inside is a failure, and the rest goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.check(name, False, f"{type(error).__name__}: {error}")

    def note(self, text: str) -> None:
        self.results["notes"].append(text)
        self.line(text)

    @property
    def ok(self) -> bool:
        """Nothing failed, and something was checked."""
        return self.failures == 0 and bool(self.results["parity"])


@dataclass(frozen=True)
class Machine:
    device: torch.device
    tiny: bool
    deadline: float

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def seconds(self, run: Callable[[], Any], repeat: int) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(repeat):
            run()
        self.wait()
        return (time.perf_counter() - start) / repeat

    def is_late(self, seconds: float = 0.0) -> bool:
        return time.monotonic() + seconds > self.deadline


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Made on the device itself: nothing large passes through the host."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.eval().requires_grad_(False)


def info_of(model: Any, max_model_len: int) -> BaseInfo:
    config = model.config
    return BaseInfo(
        name="random",
        fingerprint="sha256:0",
        architecture=type(model).__name__,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=model.model.layers[0].self_attn.head_dim,
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
    )


def decoder_of(
    model: Any, kind: str, *, block_size: int, num_tokens: int, max_model_len: int, graphs: bool
) -> tuple[FusedDecoder, KVCache]:
    """Raises Unavailable."""
    weights = decoder_weights(model, max_model_len)
    assert weights is not None
    cache = KVCache(
        info_of(model, max_model_len),
        num_blocks=1 + num_tokens // block_size,
        block_size=block_size,
        dtype=model.dtype,
        device=model.device,
    )
    return FusedDecoder(model, weights, cache, attention=kind, graphs=graphs), cache  # type: ignore[arg-type]
