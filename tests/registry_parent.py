"""The side of tests/registry_child.py that gives it its jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Child:
    """The process of tests/registry_child.py."""

    def __init__(self) -> None:
        # One thread in its libraries, too: a process that forks must have no other.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.registry_child"],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._line() == {"ready": True}

    def do(self, **job: Any) -> tuple[list[dict[str, Any]], list[int]]:
        """What the processes of a job said, and how they ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        lines = []
        while "done" not in (line := self._line()):
            lines.append(line)
        return lines, line["done"]

    def close(self) -> None:
        self._process.communicate()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found
