"""vLLM in process, its own scheduler stepped by hand: prompts as embeddings, which its prefix cache knows by hash."""

from __future__ import annotations

import argparse
import os
from typing import Any

from benchmarks.systems import vllm_settings
from benchmarks.systems.worker import Trace, Worker, serve
from benchmarks.workload import Spec, Workload


class Vllm(Worker):
    def __init__(self, arguments: argparse.Namespace, workload: Workload) -> None:
        super().__init__(arguments, workload)
        os.environ.update(vllm_settings.environment(arguments.threads))
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no hop to another process
        import torch  # after the environment is set
        import vllm

        self._torch, self._vllm = torch, vllm
        llm = vllm.LLM(model=str(arguments.model), seed=0, **vllm_settings.engine())
        self._engine: Any = llm.llm_engine
        self._llm = llm  # keeps it alive
        self._num_runs = 0

    def ready(self) -> dict[str, Any]:
        return {"torch": self._torch.__version__, "vllm": self._vllm.__version__}

    def run(self, spec: Spec) -> dict[str, Any]:
        kind = self._vllm.sampling_params.RequestOutputKind.DELTA
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=spec.new, ignore_eos=True, detokenize=False, output_kind=kind
        )
        requests = self.workload.requests(spec)
        # Without virtual tokens there is nothing to embed: token ids, as for the others.
        prompts = [
            {"prompt_embeds": self._torch.from_numpy(self.workload.whole(spec, request))}
            if spec.virtual
            else {"prompt_token_ids": request.token_ids}
            for request in requests
        ]
        self._num_runs += 1
        trace = Trace(len(requests))
        started = ended = 0
        index_of: dict[str, int] = {}
        while ended < len(prompts):
            while started < len(prompts) and started - ended < spec.rows:
                trace.submit(started)
                name = f"{self._num_runs}-{started}"
                index_of[name] = started
                self._engine.add_request(name, prompts[started], params)
                started += 1
            for output in self._engine.step():
                trace.token(index_of[output.request_id], *output.outputs[0].token_ids)
                ended += output.finished
        return trace.result()


if __name__ == "__main__":
    serve(Vllm)
