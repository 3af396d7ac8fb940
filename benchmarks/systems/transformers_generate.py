"""transformers' `generate(inputs_embeds=...)`: all rows in one batch, soft prompts computed with each."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria

from benchmarks.systems.worker import Trace, Worker, serve
from benchmarks.workload import Spec, Workload


class FirstToken(StoppingCriteria):
    """Called after every token; tells the trace of the first one (a streamer would take one row only)."""

    def __init__(self, trace: Trace) -> None:
        self._trace: Trace | None = trace

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if self._trace is not None:
            self._trace.first_of_all()
            self._trace = None
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load(arguments: argparse.Namespace) -> Any:
    torch.set_num_threads(arguments.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model.eval()
    model.generation_config.eos_token_id = None  # so that exactly `new` tokens come out
    model.generation_config.pad_token_id = 0
    return model


class Transformers(Worker):
    def __init__(self, arguments: argparse.Namespace, workload: Workload) -> None:
        super().__init__(arguments, workload)
        self._model = load(arguments)

    def ready(self) -> dict[str, Any]:
        weight_bytes = sum(p.numel() * p.element_size() for p in self._model.parameters())
        return {"torch": torch.__version__, "transformers": transformers.__version__, "weight_bytes": weight_bytes}

    @torch.inference_mode()
    def run(self, spec: Spec) -> dict[str, Any]:
        if spec.num_requests != spec.rows:
            raise ValueError("generate takes one batch, all at once")
        requests = self.workload.requests(spec)
        embeddings = torch.from_numpy(np.stack([self.workload.whole(spec, request) for request in requests]))
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
        trace = Trace(len(requests))
        output = self._model.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            max_new_tokens=spec.new,
            do_sample=False,
            stopping_criteria=[FirstToken(trace)],
        )
        for i, answer in enumerate(output.tolist()):
            trace.token(i, *answer)
        return trace.result()


if __name__ == "__main__":
    serve(Transformers)
