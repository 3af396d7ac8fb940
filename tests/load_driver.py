"""Clients in a process of their own, so that the server's threads cannot make them late. Needs nothing but Python.

Reads one JSON object per line of standard input - `requests` to send in turn as [method, path, body], `seconds`, and
either `rate` (open loop: so many a second, whatever the server does) or `clients` (closed loop) - and answers each with
a line: for every request [sent at, seconds, status, headers, body, when each part of the body came].
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 60.0


@dataclass(frozen=True)
class Sent:
    """One request, and what came back. Times in seconds, since the run began."""

    at: float
    seconds: float
    status: int  # 0: no reply, `body` says why
    headers: dict[str, str]
    body: str
    parts: list[float]

    @property
    def end(self) -> float:
        return self.at + self.seconds


class Driver:
    """The process, as its parent sees it."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self._port = port

    def start(self, requests: Sequence[Any], seconds: float, **how: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"port": self._port, "requests": requests, "seconds": seconds, **how}))
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def finish(self) -> list[Sent]:
        assert self._process.stdout is not None
        return [Sent(*item) for item in json.loads(self._process.stdout.readline())]

    def run(self, requests: Sequence[Any], seconds: float, **how: Any) -> list[Sent]:
        self.start(requests, seconds, **how)
        return self.finish()


@contextmanager
def driver(port: int) -> Iterator[Driver]:
    process = subprocess.Popen(
        [sys.executable, "-S", str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield Driver(process, port)
        finally:
            process.kill()


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def _send(port: int, start: float, method: str, path: str, body: Any) -> list[Any]:
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    at, writer = time.monotonic(), None
    headers: dict[str, str] = {}
    status, text, parts = 0, b"", []
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        status = int(lines[0].split()[1])
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        while part := await reader.read(65_536):
            parts.append(time.monotonic() - start)
            text += part
    except (OSError, EOFError) as error:
        status, text = 0, repr(error).encode()
    finally:
        if writer is not None:
            writer.close()
    return [at - start, time.monotonic() - at, status, headers, text.decode(errors="replace"), parts]


async def _drive(run: dict[str, Any]) -> list[list[Any]]:
    requests, start = itertools.cycle(run["requests"]), time.monotonic()
    end = start + run["seconds"]

    async def client() -> list[list[Any]]:
        found = []
        while time.monotonic() < end:
            found.append(await _send(run["port"], start, *next(requests)))
        return found

    if "clients" in run:
        return [item for found in await asyncio.gather(*(client() for _ in range(run["clients"]))) for item in found]
    tasks = []
    for number in range(int(run["seconds"] * run["rate"])):
        await asyncio.sleep(start + number / run["rate"] - time.monotonic())
        tasks.append(asyncio.create_task(_send(run["port"], start, *next(requests))))
    return list(await asyncio.gather(*tasks))


def main() -> None:
    for line in sys.stdin:

        async def run(given: dict[str, Any] = json.loads(line)) -> list[list[Any]]:  # noqa: B008
            return await asyncio.wait_for(_drive(given), given["seconds"] + TIMEOUT)

        sys.stdout.write(json.dumps(asyncio.run(run())) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
