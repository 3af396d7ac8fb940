"""A server over the fake engine and a real registry in a temporary folder."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from safetensors.torch import save
from starlette.testclient import TestClient

from app.api.metrics import Metrics
from app.api.server import Server, bind
from app.base_model import BaseModel
from app.checkpoint import read_checkpoint
from app.config import Settings
from app.main import create_app
from app.manifest import ManifestInput
from app.registry import Published, Registry, Store
from tests.fake_engine import FakeEngine
from tests.tiny import tiny_base

NUM_VIRTUAL_TOKENS = 4


def files(content: float = 0.5, **config: Any) -> dict[str, bytes]:
    """The two files of a PROMPT_TUNING checkpoint for the tiny Llama."""
    settings = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": NUM_VIRTUAL_TOKENS, **config}
    tensors = save({"prompt_embeddings": torch.full((NUM_VIRTUAL_TOKENS, 32), content)})
    return {"adapter_config": json.dumps(settings).encode(), "adapter_model": tensors}


@dataclass
class Harness:
    settings: Settings
    engine: FakeEngine
    registry: Registry
    base: BaseModel
    app: FastAPI

    @classmethod
    def create(cls, root: Path, answer: str = " positive review", **settings: Any) -> Harness:
        base = tiny_base("llama")
        engine = FakeEngine(base.tokenizer(answer)["input_ids"])
        registry = Registry(Store(root), base.info)
        # The client's host is "testserver".
        chosen = Settings(registry=root, **{"allowed_hosts": ("*",), **settings})
        return cls(chosen, engine, registry, base, create_app(chosen, engine, registry, base))

    def publish(self, task: str, content: float = 0.5, **manifest: Any) -> Published:
        given = files(content)
        checkpoint = read_checkpoint(
            given["adapter_config"], given["adapter_model"], ManifestInput(**manifest), self.base.info
        )
        return self.registry.publish(task, checkpoint)

    def answer(self, text: str) -> None:
        """What the engine says from now on."""
        self.engine.answer = self.tokens(text)

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self.base.tokenizer(text)["input_ids"]
        return ids

    @property
    def metrics(self) -> Metrics:
        metrics: Metrics = self.app.state.metrics
        return metrics

    @property
    def num_pins(self) -> int:
        versions = [version for task in self.registry.tasks() for version in task.versions.values()]
        return sum(self.registry.pins(version) for version in versions)

    @contextmanager
    def client(self) -> Iterator[TestClient]:
        with TestClient(self.app, raise_server_exceptions=False) as client:
            yield client

    @contextmanager
    def listening(
        self, *, drain_delay: float = 0.0, drain_timeout: float = 5.0, stall_timeout: float = 60.0
    ) -> Iterator[Listening]:
        """Run uvicorn in a thread, with small socket buffers."""
        listener = bind("127.0.0.1", 0, stall_timeout=stall_timeout)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        server = Server(
            self.app,
            listener,
            readiness=self.app.state.readiness,
            engine=self.engine,
            drain_timeout=drain_timeout,
            receive_timeout=self.settings.receive_timeout,
            send_timeout=self.settings.send_timeout,
            drain_delay=drain_delay,
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Listening(server, thread, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


@dataclass
class Listening:
    server: Server
    thread: threading.Thread
    port: int

    def post(
        self,
        path: str,
        body: dict[str, Any],
        receive_buffer: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> socket.socket:
        """A socket on which the request has been sent and nothing has been read."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return connection

    def get(self, path: str) -> tuple[int, str]:
        """Status and body, over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with closing(connection):
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()

    @property
    def num_connections(self) -> int:
        return len(self.server.server_state.connections)


def events(text: str) -> list[dict[str, Any]]:
    """The events of a complete stream, without its `[DONE]`."""
    blocks = text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""], text[-200:]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks[:-1])
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def read_stream(connection: socket.socket) -> str:
    """The body of a stream, to its end; the connection is closed."""
    with connection:
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        return reply.read().decode()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
