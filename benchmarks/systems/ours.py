"""This engine, in process: LocalEngine under asyncio, as the server uses it."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
from pathlib import Path
from typing import Any

import torch

from app.base_model import load_base_model
from app.config import default_cache_dir
from app.engine import SamplingParams
from app.engine.local import LocalEngine
from app.soft_prompt import SoftPrompt
from benchmarks.systems.worker import Trace, Worker, serve
from benchmarks.workload import Spec, Workload


def build_engine(model: Path, *, kv_cache_tokens: int | None, quantization: str | None) -> tuple[LocalEngine, int]:
    """The engine with the server's defaults, and the bytes of weights that a decode step reads."""
    base = load_base_model(str(model), cache_dir=default_cache_dir())
    options: dict[str, Any] = {} if quantization is None else {"quantization": quantization}
    engine = LocalEngine(base.model, base.info, kv_cache_tokens=kv_cache_tokens, **options)
    size = 4 if quantization is None else 1
    # An engine that keeps some layers in another format knows better than this.
    weight_bytes = getattr(engine, "weight_bytes", size * sum(p.numel() for p in base.model.parameters()))
    return engine, weight_bytes


class Ours(Worker):
    def __init__(self, arguments: argparse.Namespace, workload: Workload) -> None:
        super().__init__(arguments, workload)
        torch.set_num_threads(arguments.threads)
        self._engine, self._weight_bytes = build_engine(
            arguments.model, kv_cache_tokens=arguments.kv_cache_tokens, quantization=arguments.quantization
        )
        self._engine.start()
        self._prompts: dict[tuple[int, int, int], SoftPrompt] = {}

    def ready(self) -> dict[str, Any]:
        blocks = self._engine.stats().kv_blocks_total
        return {"torch": torch.__version__, "weight_bytes": self._weight_bytes, "kv_blocks": blocks}

    def run(self, spec: Spec) -> dict[str, Any]:
        return asyncio.run(self._run(spec))

    async def _run(self, spec: Spec) -> dict[str, Any]:
        requests = self.workload.requests(spec)
        prompts = [self._prompt(spec, request.task) for request in requests]
        params = SamplingParams(max_tokens=spec.new, temperature=0.0)  # no stop tokens: exactly `new` come out
        todo = iter(range(len(requests)))
        before = self._engine.stats()
        trace = Trace(len(requests))

        async def stream() -> None:
            for i in todo:
                trace.submit(i)
                async for token in self._engine.generate(prompts[i], requests[i].token_ids, params):
                    if token.id is not None:
                        trace.token(i, token.id)

        await asyncio.gather(*(stream() for _ in range(spec.rows)))
        result = trace.result()
        after = self._engine.stats()
        for name in ("steps", "prefix_loads", "preemptions"):
            result[name] = getattr(after, name) - getattr(before, name)
        return result

    def _prompt(self, spec: Spec, task: int) -> SoftPrompt | None:
        if spec.virtual == 0:
            return None
        key = (spec.prompt_seed, spec.virtual, task)
        if key not in self._prompts:
            tensor = torch.from_numpy(self.workload.task_prompt(spec, task).copy())
            digest = "sha256:" + hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            self._prompts[key] = SoftPrompt("embedding", tensor, digest)
        return self._prompts[key]

    def close(self) -> None:
        self._engine.stop()


if __name__ == "__main__":
    serve(Ours)
