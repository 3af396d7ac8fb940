"""This server over HTTP: soft prompts uploaded once, requests name a task. The worker is the client."""

from __future__ import annotations

import argparse
import json
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from benchmarks import http_client
from benchmarks.servers import OurServer
from benchmarks.systems.worker import Worker, serve
from benchmarks.workload import Request, Spec, Workload


class HttpOurs(Worker):
    def __init__(self, arguments: argparse.Namespace, workload: Workload) -> None:
        super().__init__(arguments, workload)
        config = AutoConfig.from_pretrained(arguments.model)
        self._shape = {"num_layers": config.num_hidden_layers, "num_heads": config.num_attention_heads}
        self._kv_bytes: int = 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self._tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
        self._server = OurServer.start(
            arguments.model,
            arguments.threads,
            device="cpu",
            dtype="float32",
            kv_cache_tokens=arguments.kv_cache_tokens,
            quantization=arguments.quantization,
        )
        self._base = json.loads(self._server.call("GET", "/v1/models")[1])["data"][0]["id"]
        self._uploaded: set[str] = set()

    def ready(self) -> dict[str, Any]:
        return {"route": "/v1/completions" if self._server.has_completions else "/v1/generate"}

    @property
    def pid(self) -> int:
        """Of the server."""
        return self._server.process.pid

    def kv_bytes(self, num_tokens: int) -> int:
        """Of so many positions in float32."""
        return num_tokens * self._kv_bytes

    def register(self, spec: Spec) -> None:
        """Upload the soft prompts of a run that are not there yet."""
        for task in range(spec.tasks):
            self._task(spec, task)

    def run(self, spec: Spec) -> dict[str, Any]:
        requests = [self._request(spec, request) for request in self.workload.requests(spec)]
        return http_client.run(self._server.port, requests, spec.rows)

    def _request(self, spec: Spec, request: Request) -> bytes:
        task = self._task(spec, request.task)
        path = "/v1/completions"
        body: dict[str, Any] = {"max_tokens": spec.new, "temperature": 0, "stream": True}
        if self._server.has_completions:
            body |= {"model": task, "prompt": request.token_ids, "ignore_eos": True}
            body["stream_options"] = {"include_usage": True}
        else:
            # Text only, which may come back from the tokenizer a token longer or shorter; the answer is as long.
            path = "/v1/generate"
            body |= {"task": task, "input": self._tokenizer.decode(request.token_ids), "ignore_eos": True}
        return http_client.post(self._server.port, path, json.dumps(body).encode())

    def _task(self, spec: Spec, task: int) -> str:
        if spec.virtual == 0:
            return str(self._base)
        name = f"s{spec.prompt_seed}-v{spec.virtual}-t{task}"
        if name not in self._uploaded:
            self._server.upload(name, self.workload.task_prompt(spec, task), **self._shape)
            self._uploaded.add(name)
        return name

    def close(self) -> None:
        self._server.stop()


if __name__ == "__main__":
    serve(HttpOurs)
