"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Processor, cores, memory and the commit; nothing that names the machine."""
    facts: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d"),
    }
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            facts["cpu"] = line.split(":", 1)[1].strip()
            break
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal"):
            facts["memory_gib"] = round(int(line.split()[1]) / 2**20, 1)
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    facts["commit"] = git.stdout.strip() or None
    return facts


def read_bandwidth(threads: int, *, gib: float = 1.0, repeats: int = 7) -> float:
    """Bytes per second of a sum over a tensor much larger than every cache; the best of several."""
    torch.set_num_threads(threads)
    tensor = torch.ones(int(gib * 2**28), dtype=torch.float32)
    best = 0.0
    for _ in range(repeats):
        begin = time.perf_counter()
        tensor.sum()
        best = max(best, tensor.nbytes / (time.perf_counter() - begin))
    return best


def rss(pid: int) -> int:
    """Resident bytes of a process, as Linux counts them."""
    for line in _lines(f"/proc/{pid}/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
