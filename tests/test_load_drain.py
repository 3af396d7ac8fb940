"""SIGTERM to a real process under load: what was accepted is finished or told, what was acknowledged is there."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.registry import Registry, Store
from tests.api_harness import events, read_stream, wait_until
from tests.load_harness import BASE, Reply, ask, tensors
from tests.shared_kernel import share_kernel
from tests.tiny import save_tiny

DRAIN_TIMEOUT = 3.0
NUM_LONG = 6
ROWS = 80
LONG = {"input": ["the"] * ROWS, "max_tokens": 300, "ignore_eos": True}  # six outlive the drain
SHORT = {"input": ["x"] * 2, "max_tokens": 100, "ignore_eos": True}


@dataclass
class Process:
    process: subprocess.Popen[str]
    port: int
    root: Path

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            return ask(connection, method, path, body, headers)
        finally:
            connection.close()

    def post(self, path: str, data: bytes, kind: str = "application/json", *, part: int | None = None) -> socket.socket:
        """A socket on which the request has been sent, or the first `part` bytes of its body."""
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(head.encode() + data[:part])
        return connection

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        wait_until(lambda: self.ask("GET", "/readyz").status == 503)

    def end(self) -> None:
        assert self.process.wait(30) == 0
        assert self.process.stderr is not None
        errors = self.process.stderr.read()
        assert "the engine died" not in errors and "Traceback" not in errors, errors


@contextmanager
def serving(root: Path, **settings: Any) -> Iterator[Process]:
    """`softprompt serve` on a tiny model, one row at a time."""
    save_tiny(root / "tiny-llama", "llama")
    share_kernel(root / "cache")
    given = {
        "MODEL": "tiny-llama",
        "REGISTRY": "prompts",
        "CACHE_DIR": "cache",
        "PORT": 0,
        "THREADS": 1,
        "ALLOWED_HOSTS": "*",
        "MAX_NUM_SEQS": 4,
        "MAX_WAITING": 3000,
        "KV_CACHE_TOKENS": 8192,
        "DRAIN_TIMEOUT": DRAIN_TIMEOUT,
        **settings,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve"],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
            **{f"SOFTPROMPT_{name}": str(value) for name, value in given.items()},
        },
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert line.startswith("softprompt ready on http://127.0.0.1:"), line + process.stderr.read()
            assert line.endswith(" (base tiny-llama, 0 tasks)\n")
            yield Process(process, int(line.split(":")[2].split()[0]), root)
        finally:
            process.kill()


def in_engine(server: Process) -> int:
    """Rows that run or wait."""
    engine = server.ask("GET", "/info").json["engine"]
    return int(engine["running"] + engine["waiting"])


def published(root: Path) -> list[int]:
    """What another process finds on disk."""
    registry = Registry(Store(root / "prompts"), BASE.info)
    return [number for task in registry.tasks() for number in task.versions]


@pytest.mark.parametrize("upload", ["goes on", pytest.param("stops", marks=pytest.mark.long)])
def test_sigterm(tmp_path: Path, upload: str) -> None:
    """One stream ends in time, another does not; a plain reply and an upload are under way."""
    kind, file = "application/octet-stream", tensors(0)
    with serving(tmp_path) as server:
        done = server.ask("POST", "/v1/tasks/mood/versions", file, {"Content-Type": kind})
        assert done.status == 201
        uploading = server.post("/v1/tasks/mood/versions", tensors(1), kind, part=200)
        short = [server.post("/v1/generate", json.dumps(SHORT | {"stream": s}).encode()) for s in (True, False)]
        wait_until(lambda: in_engine(server) == 2 * len(SHORT["input"]))  # they came first
        # One of them is a stream: thousands of events would keep the processor from what is asked here.
        streams = [False] * (NUM_LONG - 1) + [True]
        long = [server.post("/v1/generate", json.dumps(LONG | {"stream": s}).encode()) for s in streams]
        wait_until(lambda: server.ask("GET", "/info").json["engine"]["waiting"] > (NUM_LONG - 1) * ROWS)
        ended: list[Any] = [None] * (2 + NUM_LONG)
        readers = [
            threading.Thread(target=lambda i=i, c=c: ended.__setitem__(i, read_stream(c)))
            for i, c in enumerate([*short, *long])
        ]
        server.terminate()
        for reader in readers:
            reader.start()
        accepted = server.ask("GET", "/v1/models")
        if upload == "goes on":
            uploading.sendall(tensors(1)[200:])
            reply = http.client.HTTPResponse(uploading)
            reply.begin()
            assert reply.status == 201 and json.loads(reply.read())["version"] == 2
        for reader in readers:
            reader.join()
        server.end()
        assert accepted.status == 200, "the listener is open until a load balancer has seen that it drains"
        assert events(ended[0])[-1]["usage"]["completion_tokens"] == 2 * 100
        assert len(json.loads(ended[1])["outputs"]) == 2
        assert events(ended[-1])[-1]["error"]["code"] == "not_ready"
        for reply in map(json.loads, ended[2:-1]):  # finished or told
            assert "outputs" in reply or reply["error"]["code"] == "not_ready"
        with pytest.raises(ConnectionRefusedError):
            server.ask("GET", "/livez")
        uploading.close()
    assert published(tmp_path) == ([1, 2] if upload == "goes on" else [1])
    assert not [path for path in (tmp_path / "prompts").rglob("*") if "tmp" in path.name]
