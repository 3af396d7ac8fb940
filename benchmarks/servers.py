"""Servers as child processes: started on a free port, waited for, ended."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks.prompt_files import prompt_files
from benchmarks.systems.worker import die_with_parent
from benchmarks.workload import Floats

START_TIMEOUT = 600.0
ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """Any HTTP server that answers 200 on `health` when it is ready."""

    def __init__(self, command: Sequence[str], port: int, *, health: str, environment: Mapping[str, str]) -> None:
        self.port = port
        # Its output goes to our own log.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            cwd=ROOT,
            env=os.environ | dict(environment),
            preexec_fn=die_with_parent,
        )
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            with contextlib.suppress(OSError):
                if self.call("GET", health)[0] == 200:
                    return
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the server did not start: exit status {self.process.returncode}")
            time.sleep(0.5)

    def call(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class OurServer(Server):
    """`softprompt serve` over an empty registry of its own."""

    def __init__(self, model: Path, threads: int, settings: Mapping[str, Any]) -> None:
        self._registry = tempfile.TemporaryDirectory(prefix="softprompt-bench-")
        port = free_port()
        environment = {
            "SOFTPROMPT_MODEL": str(model),
            "SOFTPROMPT_REGISTRY": self._registry.name,
            "SOFTPROMPT_THREADS": str(threads),
            "SOFTPROMPT_LOG_LEVEL": "warning",
            **{f"SOFTPROMPT_{name.upper()}": str(value) for name, value in settings.items() if value is not None},
        }
        command = [sys.executable, "-m", "app.cli", "serve", "--port", str(port)]
        super().__init__(command, port, health="/readyz", environment=environment)
        self.has_completions = b'"/v1/completions"' in self.call("GET", "/openapi.json")[1]

    @classmethod
    def start(cls, model: Path, threads: int, **settings: Any) -> Self:
        return cls(model, threads, settings)

    def upload(self, task: str, prompt: Floats, *, num_layers: int, num_heads: int) -> None:
        """Register a soft prompt, as any client would."""
        boundary = uuid.uuid4().hex
        parts = prompt_files(prompt, num_layers=num_layers, num_heads=num_heads)
        body = b""
        for name, content in parts.items():
            head = f'Content-Disposition: form-data; name="{Path(name).stem}"; filename="{name}"'
            body += f"--{boundary}\r\n{head}\r\n\r\n".encode() + content + b"\r\n"
        body += f"--{boundary}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        status, reply = self.call("POST", f"/v1/tasks/{task}/versions", body, kind)
        if status not in (200, 201):
            raise RuntimeError(f"the upload of {task} was refused with {status}: {reply[:500]!r}")

    def stop(self) -> None:
        super().stop()
        self._registry.cleanup()
