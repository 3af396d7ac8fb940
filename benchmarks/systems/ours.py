"""This engine, in process: LocalEngine under asyncio, started and asked as the server does it."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import time
from typing import Any

import torch

from app.base_model import load_base_model
from app.config import Settings
from app.engine import SamplingParams
from app.local_engine import local_engine
from app.soft_prompt import SoftPrompt
from benchmarks.systems.worker import Trace, Worker, serve
from benchmarks.workload import Spec, Workload


class Ours(Worker):
    works = ("generate", "score", "prefills")

    def __init__(self, arguments: argparse.Namespace, workload: Workload) -> None:
        super().__init__(arguments, workload)
        # What `app.main.serve` does, from the same settings.
        settings = Settings.load(
            model=str(arguments.model),
            threads=arguments.threads,
            kv_cache_tokens=arguments.kv_cache_tokens,
            quantization=arguments.quantization,
        )
        torch.set_num_threads(arguments.threads)
        base = load_base_model(settings.model, cache_dir=settings.cache_dir, device="cpu", dtype="float32")
        self._engine = local_engine(settings, base)
        self._engine.start()
        self._prompts: dict[tuple[int, int, int], SoftPrompt] = {}

    def ready(self) -> dict[str, Any]:
        return {
            "torch": torch.__version__,
            "weight_bytes": self._engine.weight_bytes,
            "kv_blocks": self._engine.stats().kv_blocks_total,
            "backend": self._engine.backend,
        }

    def run(self, spec: Spec) -> dict[str, Any]:
        before = self._engine.stats()
        result = asyncio.run(self._run(spec) if spec.work == "generate" else self._classify(spec))
        after = self._engine.stats()
        for name in ("steps", "prefix_loads", "preemptions"):
            result[name] = getattr(after, name) - getattr(before, name)
        return result

    async def _run(self, spec: Spec) -> dict[str, Any]:
        requests = self.workload.requests(spec)
        prompts = [self._prompt(spec, request.task) for request in requests]
        params = SamplingParams(max_tokens=spec.new, temperature=0.0)  # no stop tokens: exactly `new` come out
        todo = iter(range(len(requests)))
        trace = Trace(len(requests))

        computed = [len(request.token_ids) for request in requests]

        async def stream() -> None:
            for i in todo:
                trace.submit(i)
                async for token in self._engine.generate(prompts[i], requests[i].token_ids, params):
                    computed[i] -= token.num_cached_tokens  # the first one says it
                    if token.id is not None:
                        trace.token(i, token.id)

        await asyncio.gather(*(stream() for _ in range(spec.rows)))
        return trace.result() | {"computed": sum(computed)}

    async def _classify(self, spec: Spec) -> dict[str, Any]:
        """Every label of every input: scored at once, or by a generation of one token behind input and label."""
        requests = self.workload.requests(spec)
        prompts = [self._prompt(spec, request.task) for request in requests]
        labels = self.workload.labels(spec)
        params = SamplingParams(max_tokens=1, temperature=0.0)
        result: dict[str, Any] = {"ttft": []}

        async def prefill(prompt: SoftPrompt | None, token_ids: list[int], salt: str) -> int:
            """Tokens of text that had to be computed."""
            known = [
                token.num_cached_tokens async for token in self._engine.generate(prompt, token_ids, params, salt=salt)
            ]
            return len(token_ids) - known[0]

        began = time.perf_counter()
        for prompt, request in zip(prompts, requests, strict=True):
            start = time.perf_counter()
            if spec.work == "score":
                await self._engine.score(prompt, request.token_ids, labels)
            else:
                # A salt each, so that nothing of the text is shared.
                each = (prefill(prompt, request.token_ids + label, str(i)) for i, label in enumerate(labels))
                result["computed"] = result.get("computed", 0) + sum(await asyncio.gather(*each))
            result["ttft"].append(time.perf_counter() - start)
        return result | {"seconds": time.perf_counter() - began, "tokens": len(labels) * len(requests)}

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
