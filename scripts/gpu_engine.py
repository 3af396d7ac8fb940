"""The whole engine, greedy, against transformers' generate: soft prompts that come, go and come back, rows mixed."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch

from app.engine import SamplingParams
from app.engine.attention_kernels import preferred_block_size
from app.engine.decoder import FusedDecoder
from app.engine.loaded_model import BLOCK_SIZE
from app.engine.local import LocalEngine
from app.engine.weights import decoder_weights
from app.soft_prompt import SoftPrompt
from scripts.gpu_common import (
    BF16_FACTOR,
    FP32_TOLERANCE,
    Machine,
    Report,
    info_of,
    largest_logit,
    random_model,
    worst,
)

PROMPTS, VIRTUAL, NEW = 6, 20, 12
TEXTS = (3, 17, 40, 8, 31, 16, 25, 5)  # tokens; one row more than prompts has none
ROUNDS = 3


def engine_parity(machine: Machine, report: Report, configs: dict[str, Any]) -> None:
    """In float32 the same tokens; in bfloat16 tokens that float32 finds as good, up to bfloat16's own error."""
    for name, config in configs.items():
        for dtype in (torch.float32, torch.bfloat16):
            label = f"engine, {name}, {str(dtype)[6:]}"
            if machine.is_late():
                report.check(label, False, "no time for it")
                continue
            with report.guard(label):
                check_engine(machine, report, label, random_model(config, dtype, machine.device))
            machine.free()


def check_engine(machine: Machine, report: Report, label: str, model: Any) -> None:
    rows = make_rows(model)
    info = info_of(model, 512)
    block_size = preferred_block_size(machine.device, model.dtype, BLOCK_SIZE, head_dim=info.head_dim, fused=True)
    of_prompt = -(-VIRTUAL // block_size)
    of_row = -(-(VIRTUAL + max(TEXTS) + NEW) // block_size) + 1
    tokens = block_size * (PROMPTS * of_prompt // 2 + 2 * of_row)  # half the prompts, and two rows at a time
    with as_on_a_gpu(machine):
        engine = LocalEngine(model, info, max_num_seqs=8, kv_cache_tokens=tokens)
    engine.start()
    try:
        rounds = [asyncio.run(answers(engine, rows)) for _ in range(ROUNDS)]
        stats = engine.stats()
    finally:
        engine.stop()
    moved = stats.prefix_evictions > 0 and stats.prefix_loads > PROMPTS
    numbers = {"evictions": stats.prefix_evictions, "loads": stats.prefix_loads}
    report.check(f"{label}: soft prompts left the cache and came back", moved, engine.backend, **numbers)
    if machine.device.type == "cuda" and model.dtype is not torch.float32:
        fine = "attention reference" not in engine.backend and "graphs on" in engine.backend
        if torch.cuda.get_device_capability(machine.device) >= (8, 0):
            report.check(f"{label}: by a kernel and graphs", fine, engine.backend)
    compare(report, label, model, rows, rounds)


def as_on_a_gpu(machine: Machine) -> Any:
    """On the CPU the engine would take the native decoder, which is not what is checked here."""
    if machine.device.type == "cuda":
        return nullcontext()

    def build(model: Any, info: Any, cache: Any, *_: Any, **__: Any) -> FusedDecoder:
        weights = decoder_weights(model, info.max_model_len)
        assert weights is not None
        return FusedDecoder(model, weights, cache)

    return patch("app.engine.loaded_model.build_forward", build)


def make_rows(model: Any) -> list[tuple[SoftPrompt | None, list[int]]]:
    """Texts behind each soft prompt, and behind none."""
    generator = torch.Generator().manual_seed(3)
    spread = float(model.get_input_embeddings().weight.float().std())
    prompts: list[SoftPrompt | None] = [None]
    for _ in range(PROMPTS):
        tensor = spread * torch.randn(VIRTUAL, model.config.hidden_size, generator=generator)
        tensor = tensor.to(model.dtype).float()  # what the model will make of it, for the float32 copy as well
        prompts.append(
            SoftPrompt("embedding", tensor, f"sha256:{hashlib.sha256(tensor.numpy().tobytes()).hexdigest()}")
        )
    return [
        (prompts[i % len(prompts)], torch.randint(1, model.config.vocab_size, (count,), generator=generator).tolist())
        for i, count in enumerate(TEXTS)
    ]


async def answers(engine: LocalEngine, rows: list[tuple[SoftPrompt | None, list[int]]]) -> list[list[int]]:
    """All at once."""
    params = SamplingParams(max_tokens=NEW, temperature=0.0)

    async def answer(prompt: SoftPrompt | None, text: list[int]) -> list[int]:
        return [token.id async for token in engine.generate(prompt, text, params) if token.id is not None]

    return await asyncio.gather(*(answer(prompt, text) for prompt, text in rows))


@torch.no_grad()
def compare(report: Report, label: str, model: Any, rows: list[Any], rounds: list[list[list[int]]]) -> None:
    exact = model
    if model.dtype is not torch.float32:
        exact = random_model(model.config, torch.float32, model.device)
        exact.load_state_dict(model.state_dict())
    same, gaps, own, truth = 0, [], [], []
    for i, (prompt, text) in enumerate(rows):
        inputs = embedded(model, prompt, text)
        generated = model.generate(
            inputs_embeds=inputs,
            attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long, device=model.device),
            do_sample=False,
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            pad_token_id=0,
        )[0].tolist()
        answered = [tuple(each[i]) for each in rounds]
        same += answered.count(tuple(generated))
        for found in dict.fromkeys(answered):
            if len(found) != NEW:
                report.check(label, False, f"an answer of {len(found)} tokens")
                return
            own.append(answer_logits(model, prompt, text, list(found)))
            truth.append(answer_logits(exact, prompt, text, list(found)))
            chosen = truth[-1].gather(1, torch.tensor(found, device=model.device)[:, None])[:, 0]
            gaps.append((truth[-1].max(dim=1).values, chosen))
    total = len(rows) * len(rounds)
    gap = worst(gaps)
    # Each of two tokens may be off by the error of its logit.
    limit = 2 * (BF16_FACTOR * worst(zip(own, truth, strict=True)) + FP32_TOLERANCE * largest_logit(truth))
    ok = gap <= limit < torch.inf and (same == total or model.dtype is not torch.float32)
    report.check(f"{label}: greedy", ok, f"{same} of {total} answers are transformers' own", gap=gap, limit=limit)


def embedded(model: Any, prompt: SoftPrompt | None, ids: list[int]) -> torch.Tensor:
    """[1, virtual + text, hidden_size]"""
    text = model.get_input_embeddings()(torch.tensor(ids, device=model.device))
    parts = [text] if prompt is None else [prompt.tensor.to(text.device, text.dtype), text]
    return torch.cat(parts)[None]


def answer_logits(model: Any, prompt: SoftPrompt | None, text: list[int], answer: list[int]) -> torch.Tensor:
    """float32, of the positions that predict the answer."""
    logits = model(inputs_embeds=embedded(model, prompt, text + answer[:-1]), use_cache=False).logits[0]
    return logits[-len(answer) :].float()
