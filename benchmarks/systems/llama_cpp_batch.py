"""llama.cpp through llama-cpp-python's low-level calls: one sequence a row, every row in one batch.

A task's virtual tokens are computed once, as embeddings, in a sequence of their own, and copied to each row of the
task (llama.cpp's own way to share a prefix). Then texts as tokens, all in one batch; then one batch a decode step.
"""

from __future__ import annotations

import argparse
import ctypes
import os
from pathlib import Path
from typing import Any

import llama_cpp as ll
import numpy as np

from benchmarks.systems.worker import Trace, Worker, serve
from benchmarks.workload import Floats, Request, Spec, Workload

UBATCH = 512
MAX_CELLS = 65_536  # of all contexts together
# Each sequence attends to its own cells only. One cache for all ("unified") attends to everybody's under a mask.
UNIFIED = bool(int(os.environ.get("BENCH_LLAMA_UNIFIED", "0")))
FLASH_ATTENTION = bool(int(os.environ.get("BENCH_LLAMA_FLASH", "1")))


class Context:
    """A llama_context with room for one shape of run; sequences 0.. are rows, those after them tasks."""

    def __init__(self, model: Any, spec: Spec, threads: int) -> None:
        cells = -(-(spec.virtual + spec.text + spec.capacity) // 256) * 256  # llama.cpp pads to this
        params = ll.llama_context_default_params()
        params.n_seq_max = spec.rows + spec.tasks
        params.n_ctx = self.cells = cells * params.n_seq_max
        params.n_batch = max(2048, spec.rows * spec.text)
        params.n_ubatch = UBATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(FLASH_ATTENTION)
        params.kv_unified = UNIFIED
        params.no_perf = True
        self.pointer = ll.llama_init_from_model(model, params)
        self.memory = ll.llama_get_memory(self.pointer)
        vocabulary = ll.llama_model_get_vocab(model)
        self._vocab_size = ll.llama_vocab_n_tokens(vocabulary)
        self._hidden = ll.llama_model_n_embd(model)
        self._tokens = ll.llama_batch_init(params.n_batch, 0, 1)
        self._embeddings = ll.llama_batch_init(max(spec.virtual, 1), self._hidden, 1)
        self.resident: set[tuple[int, int]] = set()  # (prompt_seed, task)

    def load(self, sequence: int, prompt: Floats) -> None:
        """Compute a soft prompt's keys and values into a sequence."""
        ll.llama_memory_seq_rm(self.memory, sequence, -1, -1)
        batch = self._embeddings
        ctypes.memmove(batch.embd, np.ascontiguousarray(prompt).ctypes.data, prompt.nbytes)
        for i in range(len(prompt)):
            self._place(batch, i, i, sequence, False)
        batch.n_tokens = len(prompt)
        self._decode(batch)

    def decode(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Feed (token, position, sequence, wanted); the greedy next token of each wanted entry."""
        batch = self._tokens
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i] = token
            self._place(batch, i, position, sequence, wanted)
        batch.n_tokens = len(entries)
        self._decode(batch)
        count = sum(wanted for *_, wanted in entries)
        logits = np.ctypeslib.as_array(ll.llama_get_logits(self.pointer), (count, self._vocab_size))
        chosen: list[int] = logits.argmax(axis=1).tolist()
        return chosen

    @staticmethod
    def _place(batch: Any, i: int, position: int, sequence: int, wanted: bool) -> None:
        batch.pos[i] = position
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = sequence
        batch.logits[i] = wanted

    def _decode(self, batch: Any) -> None:
        status = ll.llama_decode(self.pointer, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status}")

    def close(self) -> None:
        ll.llama_batch_free(self._tokens)
        ll.llama_batch_free(self._embeddings)
        ll.llama_free(self.pointer)


class LlamaCpp(Worker):
    def __init__(self, arguments: argparse.Namespace, workload: Workload) -> None:
        super().__init__(arguments, workload)
        ll.llama_backend_init()
        self._model = ll.llama_model_load_from_file(bytes(arguments.model), ll.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"cannot load {arguments.model}")
        self._contexts: dict[tuple[Any, ...], Context] = {}  # the one used last is the last

    def ready(self) -> dict[str, Any]:
        size = ll.llama_model_size(self._model)
        return {"llama-cpp-python": ll.__version__, "weight_bytes": size, "format": Path(self.arguments.model).name}

    def run(self, spec: Spec) -> dict[str, Any]:
        if spec.num_requests != spec.rows:
            raise ValueError("this loop takes one batch, all at once")
        context = self._fitting(spec)
        requests = self.workload.requests(spec)
        prompts = [self.workload.task_prompt(spec, request.task) for request in requests]
        trace = Trace(len(requests))
        last = self._prefill(context, spec, requests, prompts)
        for i, token in enumerate(last):
            trace.token(i, token)
        for position in range(spec.virtual + spec.text, spec.virtual + spec.text + spec.new - 1):
            last = context.decode([(token, position, row, True) for row, token in enumerate(last)])
            for i, token in enumerate(last):
                trace.token(i, token)
        return trace.result()

    @staticmethod
    def _prefill(context: Context, spec: Spec, requests: list[Request], prompts: list[Floats]) -> list[int]:
        entries = []
        for row, request in enumerate(requests):
            ll.llama_memory_seq_rm(context.memory, row, -1, -1)
            if spec.virtual:
                source = spec.rows + request.task
                if (spec.prompt_seed, request.task) not in context.resident:
                    context.load(source, prompts[row])
                    context.resident = {key for key in context.resident if key[1] != request.task}
                    context.resident.add((spec.prompt_seed, request.task))
                ll.llama_memory_seq_cp(context.memory, source, row, -1, -1)
            for offset, token in enumerate(request.token_ids):
                entries.append((token, spec.virtual + offset, row, offset == spec.text - 1))
        return context.decode(entries)

    def _fitting(self, spec: Spec) -> Context:
        """The context of earlier runs of this shape, whose soft prompts stay resident; the oldest make room.

        New soft prompts have one of their own, so that they do not push out the known ones.
        """
        shape = (spec.rows, spec.virtual, spec.text, spec.tasks, spec.capacity, spec.prompt_seed != 0)
        context = self._contexts.pop(shape, None) or Context(self._model, spec, self.arguments.threads)
        while self._contexts and context.cells + sum(each.cells for each in self._contexts.values()) > MAX_CELLS:
            self._contexts.pop(next(iter(self._contexts))).close()
        self._contexts[shape] = context
        return context


if __name__ == "__main__":
    serve(LlamaCpp)
