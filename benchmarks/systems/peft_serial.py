"""PEFT as it is used today: one model, one adapter a task, `set_adapter` per request, one request at a time."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from benchmarks.prompt_files import write_prompt
from benchmarks.systems.transformers_generate import FirstToken, load
from benchmarks.systems.worker import Trace, Worker, serve
from benchmarks.workload import Spec, Workload


class OneRow(Trace):
    """The row under way, seen by FirstToken as if it were all."""

    def __init__(self, trace: Trace, index: int) -> None:
        self._whole, self._index = trace, index

    def first_of_all(self) -> None:
        self._whole.first(self._index)


class Peft(Worker):
    def __init__(self, arguments: argparse.Namespace, workload: Workload) -> None:
        super().__init__(arguments, workload)
        self._base = load(arguments)
        self._model: Any = None

    def ready(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}

    @torch.inference_mode()
    def run(self, spec: Spec) -> dict[str, Any]:
        requests = self.workload.requests(spec)
        names = [self._adapter(spec, request.task) for request in requests]
        trace = Trace(len(requests))
        for i, (request, name) in enumerate(zip(requests, names, strict=True)):
            model = self._base if name is None else self._model
            if name is not None:
                model.set_adapter(name)
            ids = torch.tensor([request.token_ids])
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=spec.new,
                do_sample=False,
                stopping_criteria=[FirstToken(OneRow(trace, i))],
            )
            trace.token(i, *output[0, ids.shape[1] :].tolist())
        return trace.result()

    def _adapter(self, spec: Spec, task: int) -> str | None:
        """Loaded through PEFT's own files, once."""
        if spec.virtual == 0:
            return None
        name = f"s{spec.prompt_seed}v{spec.virtual}t{task}"
        if self._model is not None and name in self._model.peft_config:
            return name
        with tempfile.TemporaryDirectory() as folder:
            write_prompt(Path(folder), self.workload.task_prompt(spec, task), self._base.config)
            if self._model is None:
                self._model = peft.PeftModel.from_pretrained(self._base, folder, adapter_name=name)
                self._model.eval()
            else:
                self._model.load_adapter(folder, adapter_name=name)
        return name


if __name__ == "__main__":
    serve(Peft)
