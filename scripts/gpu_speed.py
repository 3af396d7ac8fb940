"""How fast: decoding of a random Llama-3-8B against the memory's bandwidth and transformers' generate."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig

from app.engine import SamplingParams
from app.engine.attention_check import Faulty, Unavailable
from app.engine.attention_kernels import FLASH2_PAGE
from app.engine.decoder import FusedDecoder
from app.engine.forward import Span
from app.engine.local import LocalEngine
from scripts.gpu_common import ATTENTION, Machine, Report, decoder_of, info_of, random_model

BATCHES = (1, 8, 64, 256)
CONTEXT, NEW_TOKENS = 128, 64
GENERATE_TOKENS = 16


def bandwidth(machine: Machine, report: Report) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones((1 << 24) if machine.tiny else (1 << 30), dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = min(machine.seconds(lambda: target.copy_(source), 10) for _ in range(3))
    rate = 2 * source.numel() / seconds
    report.results["copy_bytes_per_second"] = rate
    report.line(f"copy bandwidth {rate / 1e9:.0f} GB/s")
    return rate


def large_config(machine: Machine) -> LlamaConfig:
    shape: dict[str, Any] = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    if machine.tiny:
        shape |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**shape, max_position_embeddings=8192, pad_token_id=0, bos_token_id=None, eos_token_id=None)


def decode_speed(machine: Machine, report: Report) -> None:
    rate = bandwidth(machine, report)
    dtype = torch.float32 if machine.device.type == "cpu" else torch.bfloat16
    model = random_model(large_config(machine), dtype, machine.device)
    parameters = sum(p.numel() for p in model.parameters())
    report.line(f"random Llama of {parameters / 1e9:.2f} B in {dtype}")
    batches = BATCHES[:2] if machine.tiny else BATCHES
    kinds = [(kind, size, True) for kind, size in ATTENTION[1:]] + [(kind, size, False) for kind, size in ATTENTION]
    if machine.device.type != "cuda":
        kinds = [("reference", 16, False)]
    for kind, block_size, graphs in kinds:
        per_row = -(-(CONTEXT + NEW_TOKENS + 8) // block_size) * block_size
        name = f"{kind}, {'graphs' if graphs else 'eager'}"
        options = {"block_size": block_size, "num_tokens": per_row * max(batches), "max_model_len": 8192}
        if machine.is_late(60):
            report.note(f"no time for {name}")
            continue
        with report.guard(f"speed of {name}"):
            try:
                forward, cache = decoder_of(model, kind, graphs=graphs, **options)
            except Faulty as error:
                report.check(f"speed of {name}", False, str(error))
                continue
            except Unavailable as error:
                report.note(f"--   {name}: {error}")
                continue
            cache.data.normal_(std=0.5)
            for batch in batches:
                if machine.is_late(60):
                    report.note(f"no time for {name} at batch {batch}")
                    break
                seconds = raw_decode(forward, batch, per_row // block_size, machine)
                add_speed(report, model, name, batch, seconds, rate)
            if graphs and forward._graphs is None:
                report.check(f"speed of {name}", False, forward.describe)
            del forward, cache
        machine.free()
    with report.guard("speed of the engine"):
        engine_speed(machine, report, model, batches, rate)
    machine.free()
    with report.guard("speed of transformers"):
        generate_speed(machine, report, model, batches, rate)


def raw_decode(forward: FusedDecoder, batch: int, blocks: int, machine: Machine) -> float:
    """Seconds a step of greedy decoding: forward, argmax, and the tokens back on the host."""
    tables = [list(range(1 + i * blocks, 1 + (i + 1) * blocks)) for i in range(batch)]
    tokens = list(range(1, batch + 1))
    times = []
    for step in range(4 if machine.tiny else NEW_TOKENS + 4):
        position = CONTEXT + step
        machine.wait()
        start = time.perf_counter()
        spans = [Span(table, position, position + 1, [token], 1) for table, token in zip(tables, tokens, strict=True)]
        tokens = forward(spans).argmax(dim=-1).tolist()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])  # the first ones capture and warm up


def add_speed(report: Report, model: Any, name: str, batch: int, seconds: float, rate: float) -> None:
    """A step reads every weight once, except the embedding table, and every row's keys and values."""
    config = model.config
    size = model.dtype.itemsize
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    read = size * (weights + batch * (CONTEXT + NEW_TOKENS / 2) * per_token)
    share = read / seconds / rate
    report.results["decode"].append(
        {
            "name": name,
            "batch": batch,
            "ms_per_step": 1e3 * seconds,
            "tokens_per_second": batch / seconds,
            "share_of_bandwidth": share,
        }
    )
    report.line(
        f"{name:28} batch {batch:3}: {1e3 * seconds:8.2f} ms/step, {batch / seconds:9.0f} tokens/s, "
        f"{share:5.0%} of the bandwidth"
    )


def engine_speed(machine: Machine, report: Report, model: Any, batches: tuple[int, ...], rate: float) -> None:
    """The whole engine, scheduler and sampler included; what it adds to the forward is the difference."""
    if machine.is_late(60):
        report.note("no time for the engine")
        return
    new_tokens = 8 if machine.tiny else NEW_TOKENS
    tokens = max(batches) * (CONTEXT + NEW_TOKENS + FLASH2_PAGE)
    engine = LocalEngine(model, info_of(model, 8192), max_num_seqs=max(batches), kv_cache_tokens=tokens)
    report.line(f"engine: {engine.backend}")
    engine.start()
    try:
        for batch in batches:
            if machine.is_late(45):
                report.note(f"no time for the engine at batch {batch}")
                break
            asyncio.run(engine_run(engine, model.config.vocab_size, batch, new_tokens))  # captures graphs
            seconds = asyncio.run(engine_run(engine, model.config.vocab_size, batch, new_tokens))
            add_speed(report, model, "engine", batch, seconds, rate)
    finally:
        engine.stop()


async def engine_run(engine: LocalEngine, vocab_size: int, batch: int, new_tokens: int) -> float:
    """Seconds a step, from the moment every row has its first token."""
    params = SamplingParams(max_tokens=new_tokens, temperature=1.0, seed=0)
    choose = random.Random(batch)  # different texts: nothing to share
    prompts = [[choose.randrange(1, vocab_size) for _ in range(CONTEXT)] for _ in range(batch)]
    times: list[list[float]] = []

    async def consume(prompt: list[int]) -> None:
        arrivals = []
        async for _ in engine.generate(None, prompt, params):
            arrivals.append(time.perf_counter())
        times.append(arrivals)

    await asyncio.gather(*(consume(prompt) for prompt in prompts))
    last_first = max(arrivals[0] for arrivals in times)
    last_end = max(arrivals[-1] for arrivals in times)
    steps = max(1, max(sum(t > last_first for t in arrivals) for arrivals in times))
    return (last_end - last_first) / steps


@torch.no_grad()
def generate_speed(machine: Machine, report: Report, model: Any, batches: tuple[int, ...], rate: float) -> None:
    for batch in batches:
        if machine.is_late(30):
            report.note(f"no time for transformers at batch {batch}")
            break
        ids = torch.randint(1, model.config.vocab_size, (batch, CONTEXT), device=machine.device)

        def generate(count: int, ids: torch.Tensor = ids) -> None:
            mask = torch.ones_like(ids)
            model.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=count, max_new_tokens=count)

        generate(2)
        short = machine.seconds(lambda: generate(2), 1)
        long = machine.seconds(lambda: generate(2 + GENERATE_TOKENS), 1)
        add_speed(report, model, "transformers generate", batch, max(long - short, 1e-9) / GENERATE_TOKENS, rate)
