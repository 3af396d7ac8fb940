"""Logits of the fused decoder, by every attention that can be had, against transformers' own forward."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from app.engine.attention_check import Faulty, Unavailable
from app.engine.decoder import FusedDecoder
from app.engine.forward import Span
from app.engine.kv_cache import KVCache
from scripts.gpu_common import (
    ATTENTION,
    BF16_FACTOR,
    FP32_TOLERANCE,
    Machine,
    Report,
    decoder_of,
    largest_logit,
    random_model,
    worst,
)

DECODED = 25  # positions at the end of each row, one a step


def configurations(machine: Machine) -> dict[str, Any]:
    """Every kind of layer the decoder knows, with heads that the kernels take."""
    common: dict[str, Any] = {
        "vocab_size": 128 if machine.tiny else 512,
        "hidden_size": 64 if machine.tiny else 256,
        "intermediate_size": 128 if machine.tiny else 512,
        "num_hidden_layers": 2 if machine.tiny else 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16 if machine.tiny else 64,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2 if machine.tiny else 0.1,  # far above a real one, so that attention is sharp
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    windows = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    found = {
        "llama": LlamaConfig(**common),
        "qwen2, two windows": Qwen2Config(**common, **windows),
        "qwen3": Qwen3Config(**common),
        "mistral, window": MistralConfig(**common, sliding_window=24),
    }
    if not machine.tiny:
        large = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "initializer_range": 0.02}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
        found["llama of 1 B"] = LlamaConfig(**common | large | heads)
    return found


@dataclass(eq=False)
class Row:
    inputs: torch.Tensor  # [length, hidden_size]: virtual tokens, then the text's embeddings
    virtual: int
    ids: list[int]
    table: list[int] = field(default_factory=list)

    def span(self, start: int, end: int, num_logits: int) -> Span:
        given = self.inputs[start:end] if start < self.virtual else self.ids[start - self.virtual : end - self.virtual]
        return Span(self.table, start, end, given, num_logits)


def make_rows(model: Any) -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length, virtual in ((3, 0), (30, 20), (64, 0), (90, 0), (200, 0), (41, 9)):
        ids = torch.randint(model.config.vocab_size, (length,), generator=generator)
        text = model.get_input_embeddings()(ids.to(model.device))
        prompt = torch.randn(virtual, text.shape[1], generator=generator) * float(text.float().std())
        rows.append(Row(torch.cat((prompt.to(text.device, text.dtype), text)), virtual, ids.tolist()))
    return rows


def assign_blocks(rows: list[Row], block_size: int) -> int:
    """Scattered tables; returns how many positions the cache must have."""
    counts = [-(-len(row.inputs) // block_size) for row in rows]
    blocks = random.Random(0).sample(range(1, sum(counts) + 1), sum(counts))
    for row, count in zip(rows, counts, strict=True):
        row.table, blocks = blocks[:count], blocks[count:]
    return sum(counts) * block_size


def run_rows(forward: FusedDecoder, rows: list[Row]) -> list[torch.Tensor]:
    """Every position's logits by chunked prefill beside decoding rows, then decoding all that is left."""
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    done = [0] * len(rows)
    choose = random.Random(2)
    while any(d < len(row.inputs) for d, row in zip(done, rows, strict=True)):
        spans, owners = [], []
        for i, row in enumerate(rows):
            left = (row.virtual if done[i] < row.virtual else len(row.inputs)) - done[i]
            if left <= 0:
                continue
            in_prefill = left > DECODED or done[i] < row.virtual
            count = min(left, choose.randint(2, 60)) if in_prefill else 1
            spans.append(row.span(done[i], done[i] + count, count))
            owners.append(i)
            done[i] += count
        logits = forward(spans)
        parts = logits.split([span.num_logits for span in spans])
        for i, part in zip(owners, parts, strict=True):
            found[i].append(part)
    return [torch.cat(parts) for parts in found]


@torch.no_grad()
def parity(machine: Machine, report: Report) -> None:
    on_cuda = machine.device.type == "cuda"
    seen: set[tuple[str, bool]] = set()  # kernels, eager or as graphs, that were right in bfloat16
    for name, config in configurations(machine).items():
        for dtype in (torch.float32, torch.bfloat16):
            label = f"{name}, {str(dtype)[6:]}"
            if machine.is_late():
                report.check(label, False, "no time for it")
                continue
            with report.guard(label):
                model, rows, own, truth = oracle(config, dtype, machine.device)
                for kind, block_size in ATTENTION:
                    for graphs in (False, True) if on_cuda else (False,):
                        each = f"{label}, {kind}, {'graphs' if graphs else 'eager'}"
                        if machine.is_late():
                            report.check(each, False, "no time for it")
                            continue
                        with report.guard(each):
                            ok = check_kind(report, each, model, kind, block_size, graphs, rows, own, truth)
                            if ok and dtype is torch.bfloat16 and kind != "reference":
                                seen.add((kind, graphs))
                del model
            machine.free()
    if on_cuda and torch.cuda.get_device_capability(machine.device) >= (8, 0):
        require_kernels(report, seen)


def require_kernels(report: Report, seen: set[tuple[str, bool]]) -> None:
    """A card that has kernels must have run one, or all the rest says little."""
    for graphs in (False, True):
        found = ", ".join(sorted(kind for kind, with_graphs in seen if with_graphs == graphs))
        way = "as graphs" if graphs else "eager"
        report.check(f"a kernel in bfloat16, {way}", bool(found), found or "none was checked and right")


def oracle(config: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, list[Row], Any, Any]:
    """The model, rows, transformers' logits for them, and the same by a float32 copy of the model."""
    model = random_model(config, dtype, device)
    rows = make_rows(model)
    own = [model(inputs_embeds=row.inputs[None], use_cache=False).logits[0].float() for row in rows]
    truth = own
    if dtype is not torch.float32:
        exact = random_model(config, torch.float32, device)
        exact.load_state_dict(model.state_dict())
        truth = [exact(inputs_embeds=row.inputs[None].float(), use_cache=False).logits[0] for row in rows]
    return model, rows, own, truth


def check_kind(
    report: Report,
    label: str,
    model: Any,
    kind: str,
    block_size: int,
    graphs: bool,
    rows: list[Row],
    own: list[torch.Tensor],
    truth: list[torch.Tensor],
) -> bool:
    """Whether it exists here and is right. That it cannot exist is no failure; that it does not work is one."""
    before = report.failures
    tokens = assign_blocks(rows, block_size)
    options = {"block_size": block_size, "num_tokens": tokens, "max_model_len": 1024, "graphs": graphs}
    try:
        forward, cache = decoder_of(model, kind, **options)
    except Faulty as error:
        report.check(label, False, str(error))
        return False
    except Unavailable as error:
        report.note(f"--   {label}: {error}")
        return False
    check_rows(report, label, forward, cache, rows, own, truth)
    if graphs:
        check_graphs(report, label, forward)
    return report.failures == before


def check_graphs(report: Report, label: str, forward: FusedDecoder) -> None:
    """A decoder whose capture fails goes on without graphs, and is right all the same."""
    runner = forward._graphs
    if runner is None or not runner._graphs:
        report.check(f"{label}: captured", False, forward.describe)


def check_rows(
    report: Report,
    label: str,
    forward: FusedDecoder,
    cache: KVCache,
    rows: list[Row],
    own: list[torch.Tensor],
    truth: list[torch.Tensor],
) -> None:
    cache.data[:, :, cache.block_size :] = torch.nan  # whoever reads what he should not is found out
    mixed = run_rows(forward, rows)
    theirs = worst(zip(own, truth, strict=True))
    limit = BF16_FACTOR * theirs + FP32_TOLERANCE * largest_logit(truth)
    ours = worst(zip(mixed, truth, strict=True))
    report.check(label, ours <= limit < torch.inf, error=ours, transformers=theirs, limit=limit)
    alone = worst((run_rows(forward, [row])[0], logits) for row, logits in zip(rows, mixed, strict=True))
    report.check(f"{label}: rows alone", alone <= 2 * limit < torch.inf, difference=alone, limit=2 * limit)
    broken = Row(torch.full_like(rows[1].inputs, torch.nan), len(rows[1].inputs), [], rows[1].table)
    beside = run_rows(forward, [rows[0], broken, *rows[2:]])
    spread = worst((logits, truth[i]) for i, logits in enumerate(beside) if i != 1)
    spoilt = bool(beside[1].isnan().all())
    report.check(f"{label}: beside a row of NaN", spread <= limit < torch.inf and spoilt, error=spread)
