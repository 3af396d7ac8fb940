"""A worker process as the server sees it: an order in, messages out, and ways to end it.

Messages have a `kind`: alive, step (the members of app.train.report.Progress), and last of all one of checked, trained,
refused (the data), failed (the training), full (the disk) and stopped (by SIGTERM). A worker that ends without one of
the last has crashed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "app.train.worker")
MAX_LINE = 2**22  # bytes
ENDINGS = ("checked", "trained", "refused", "failed", "full", "stopped")
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "PYTHONPATH")


@dataclass(frozen=True)
class Bounds:
    """What a worker may take from the machine."""

    threads: int = 1
    nice: int = 10
    memory_bytes: int | None = None  # of data, not counting the mapped weights; Linux alone keeps to it


class Worker:
    """One process, the leader of a group of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(
        cls, command: Sequence[str], order: dict[str, Any], log: Path, bounds: Bounds, leases: Sequence[int]
    ) -> Worker:
        """`leases` are descriptors that live as long as the process does. Raises OSError."""
        threads = str(bounds.threads)
        # NOTE: nothing of the server's settings, which hold secrets.
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=descriptor,
                cwd=Path(__file__).parents[2],
                env=environment,
                pass_fds=tuple(leases),
                start_new_session=True,
                limit=MAX_LINE,
            )
        finally:
            os.close(descriptor)
        _bound(process.pid, bounds)
        assert process.stdin is not None
        process.stdin.write(json.dumps({**order, "threads": bounds.threads}).encode() + b"\n")
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def message(self, timeout: float) -> dict[str, Any] | None:
        """The next one; None once there will be no more. Raises TimeoutError."""
        assert self._process.stdout is not None
        while True:
            try:
                async with asyncio.timeout(timeout):
                    line = await self._process.stdout.readline()
            except ValueError:  # longer than any message of ours
                return None
            if not line:
                return None
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if isinstance(found, dict) and isinstance(found.get("kind"), str):
                return found
            logger.warning("a training worker said what is no message")

    def terminate(self) -> None:
        """Ask it to save its state and end."""
        self._signal(signal.SIGTERM)

    async def end(self, grace: float) -> int:
        """Wait for its end, for `grace` seconds; then kill it, and whatever it has started. The exit status."""
        assert self._process.stdout is not None
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                # What it still says is read, or it could not end.
                while await self._process.stdout.read(2**16):
                    pass
                await self._process.wait()
        if self._process.returncode is None:
            self._signal(signal.SIGKILL)
        status = await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        return status

    def _signal(self, number: signal.Signals) -> None:
        # NOTE: only before it is waited for: then the number is still its own.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def _bound(pid: int, bounds: Bounds) -> None:
    """From outside, so that it holds from the first moment on."""
    with suppress(ProcessLookupError, PermissionError):
        os.setpriority(os.PRIO_PROCESS, pid, max(bounds.nice, os.getpriority(os.PRIO_PROCESS, 0)))
    if sys.platform != "linux":
        return
    import resource

    with suppress(OSError):
        # The kernel's first choice when memory runs out: a job can go on later, the server's streams cannot.
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
    with suppress(OSError):
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
        if bounds.memory_bytes is not None:
            resource.prlimit(pid, resource.RLIMIT_DATA, (bounds.memory_bytes, bounds.memory_bytes))
