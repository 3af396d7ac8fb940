"""Is the CUDA path right on this machine, and how fast is it?

Compares the fused decoder, with every attention implementation that can be had here, eager and as CUDA graphs, with
transformers' own forward; then times decoding of a randomly initialised Llama-3-8B against the memory's bandwidth and
against transformers' generate. Needs torch, transformers and safetensors. Exits with 1 when something is not right,
with 2 without a CUDA device. `--tiny` runs all of it with toy shapes on the CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from app.engine import SamplingParams
from app.engine.attention_kernels import FLASH2_PAGE, Unavailable
from app.engine.decoder import FusedDecoder
from app.engine.forward import Span
from app.engine.kv_cache import KVCache
from app.engine.weights import decoder_weights
from app.soft_prompt import BaseInfo

FP32_TOLERANCE = 1e-3  # of logits, relative to the largest or 1
BF16_FACTOR = 1.5  # our error against transformers' own, both against float32
BATCHES = (1, 8, 64, 256)
CONTEXT, NEW_TOKENS = 128, 64
GENERATE_TOKENS = 16
# (implementation, block size): FlashAttention-2 pages blocks of 256 only.
ATTENTION = (("reference", 16), ("flashinfer", 16), ("varlen", FLASH2_PAGE))


@dataclass
class Report:
    """Printed as it grows."""

    started: float = field(default_factory=time.monotonic)
    results: dict[str, Any] = field(default_factory=lambda: {"parity": [], "decode": [], "notes": []})
    failures: int = 0

    def line(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.1f}s] {text}", flush=True)

    def check(self, name: str, ok: bool, **numbers: float) -> None:
        self.failures += not ok
        self.results["parity"].append({"name": name, "ok": ok, **numbers})
        shown = ", ".join(f"{key} {value:.2e}" for key, value in numbers.items())
        self.line(f"{'ok  ' if ok else 'FAIL'} {name}: {shown}")

    def note(self, text: str) -> None:
        self.results["notes"].append(text)
        self.line(text)


@dataclass(frozen=True)
class Machine:
    device: torch.device
    tiny: bool
    deadline: float

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
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


# -- models ------------------------------------------------------------------------------------------------------------


def configurations(machine: Machine) -> dict[str, Any]:
    """Every kind of layer the decoder knows, with heads that the kernels take."""
    common: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64 if machine.tiny else 256,
        "intermediate_size": 128 if machine.tiny else 512,
        "num_hidden_layers": 3,
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


# -- parity ------------------------------------------------------------------------------------------------------------


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
            in_prefill = left > 25 or done[i] < row.virtual
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
    for name, config in configurations(machine).items():
        for dtype in (torch.float32, torch.bfloat16):
            if machine.is_late():
                report.note(f"no time for {name}")
                continue
            model = random_model(config, dtype, machine.device)
            rows = make_rows(model)
            own = [model(inputs_embeds=row.inputs[None], use_cache=False).logits[0].float() for row in rows]
            truth = own
            if dtype is not torch.float32:
                exact = random_model(config, torch.float32, machine.device)
                exact.load_state_dict(model.state_dict())
                truth = [exact(inputs_embeds=row.inputs[None].float(), use_cache=False).logits[0] for row in rows]
                del exact
            for kind, block_size in ATTENTION:
                for graphs in (False, True) if machine.device.type == "cuda" else (False,):
                    label = f"{name}, {str(dtype)[6:]}, {kind}, {'graphs' if graphs else 'eager'}"
                    tokens = assign_blocks(rows, block_size)
                    options = {"block_size": block_size, "num_tokens": tokens, "max_model_len": 1024, "graphs": graphs}
                    try:
                        forward, cache = decoder_of(model, kind, **options)
                    except Unavailable as error:
                        if not graphs:
                            report.note(f"--   {label}: {error}")
                        continue
                    check_rows(report, label, forward, cache, rows, own, truth)
            del model
            machine.free()


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
    largest = max(1.0, max(float(logits.abs().max()) for logits in truth))
    mixed = run_rows(forward, rows)
    theirs = max(float((a - b).abs().max()) for a, b in zip(own, truth, strict=True))
    limit = BF16_FACTOR * theirs + FP32_TOLERANCE * largest
    ours = max(float((a - b).abs().max()) for a, b in zip(mixed, truth, strict=True))
    report.check(label, ours <= limit, error=ours, transformers=theirs, limit=limit)
    alone = max(
        float((run_rows(forward, [row])[0] - logits).abs().max()) for row, logits in zip(rows, mixed, strict=True)
    )
    report.check(f"{label}: rows alone", alone <= 2 * limit, difference=alone, limit=2 * limit)
    broken = Row(torch.full_like(rows[1].inputs, torch.nan), len(rows[1].inputs), [], rows[1].table)
    beside = run_rows(forward, [rows[0], broken, *rows[2:]])
    spread = max(
        float((logits - truth[i]).abs().nan_to_num(nan=torch.inf).max()) for i, logits in enumerate(beside) if i != 1
    )
    report.check(f"{label}: beside a row of NaN", spread <= limit and bool(beside[1].isnan().all()), error=spread)


# -- speed -------------------------------------------------------------------------------------------------------------


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
        try:
            forward, cache = decoder_of(model, kind, graphs=graphs, **options)
        except Unavailable as error:
            report.note(f"--   {name}: {error}")
            continue
        cache.data.normal_(std=0.5)
        for batch in batches:
            if machine.is_late(60):
                report.note(f"no time for {name} at batch {batch}")
                continue
            seconds = raw_decode(forward, batch, per_row // block_size, machine)
            add_speed(report, model, name, batch, seconds, rate)
        del forward, cache
        machine.free()
    engine_speed(machine, report, model, batches, rate)
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
    try:
        from app.engine.local import LocalEngine

        new_tokens = 8 if machine.tiny else NEW_TOKENS
        tokens = max(batches) * (CONTEXT + NEW_TOKENS + FLASH2_PAGE)
        engine = LocalEngine(model, info_of(model, 8192), max_num_seqs=max(batches), kv_cache_tokens=tokens)
        report.line(f"engine: {engine.backend}")
        engine.start()
        try:
            for batch in batches:
                if machine.is_late(45):
                    report.note(f"no time for the engine at batch {batch}")
                    continue
                asyncio.run(engine_run(engine, batch, new_tokens))  # captures graphs
                add_speed(report, model, "engine", batch, asyncio.run(engine_run(engine, batch, new_tokens)), rate)
        finally:
            engine.stop()
        del engine
        machine.free()
    except Exception as error:  # a measurement, not a check
        report.note(f"the engine was not measured: {type(error).__name__}: {error}")


async def engine_run(engine: Any, batch: int, new_tokens: int) -> float:
    """Seconds a step, from the moment every row has its first token."""
    params = SamplingParams(max_tokens=new_tokens, temperature=1.0, seed=0)
    vocab_size = engine._info.vocab_size
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
            continue
        ids = torch.randint(1, model.config.vocab_size, (batch, CONTEXT), device=machine.device)

        def generate(count: int, ids: torch.Tensor = ids) -> None:
            mask = torch.ones_like(ids)
            model.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=count, max_new_tokens=count)

        generate(2)
        short = machine.seconds(lambda: generate(2), 1)
        long = machine.seconds(lambda: generate(2 + GENERATE_TOKENS), 1)
        add_speed(report, model, "transformers generate", batch, max(long - short, 1e-9) / GENERATE_TOKENS, rate)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy shapes, on the CPU")
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--seconds", type=float, default=420, help="start no measurement after so long")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        print("this needs a CUDA device; --tiny runs the same on the CPU with toy shapes", file=sys.stderr)
        return 2
    device = torch.device("cpu") if arguments.tiny else torch.device("cuda")
    if arguments.tiny:
        torch.set_num_threads(1)  # toy shapes lose more to threads than they gain
    report = Report()
    machine = Machine(device, arguments.tiny, time.monotonic() + arguments.seconds)
    name = "CPU" if arguments.tiny else torch.cuda.get_device_name(device)
    report.results |= {"device": name, "torch": torch.__version__, "tiny": arguments.tiny}
    report.line(f"{name}, torch {torch.__version__}")
    parity(machine, report)
    decode_speed(machine, report)
    report.results["ok"] = report.failures == 0
    if arguments.json:
        arguments.json.write_text(json.dumps(report.results, indent=1) + "\n", encoding="utf-8")
    report.line(f"{len(report.results['parity'])} checks, {report.failures} failed")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
