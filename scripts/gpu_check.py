"""Is the CUDA path right on this machine, and how fast is it?

Compares the fused decoder, with every attention implementation that can be had here, eager and as CUDA graphs, with
transformers' own forward, and the whole engine with transformers' generate; then times decoding of a randomly
initialised Llama-3-8B against the memory's bandwidth and against transformers' generate. Needs torch, transformers and
safetensors. Exits with 1 when something is not right or was not checked, with 2 without a CUDA device. `--tiny` runs
all of it with toy shapes on the CPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from scripts.gpu_common import Machine, Report
from scripts.gpu_engine import engine_parity
from scripts.gpu_parity import configurations, parity
from scripts.gpu_speed import decode_speed

SECONDS = 400.0  # no measurement starts after that
HARD_SECONDS = 450.0  # and after that the process ends: whoever lends the machine may take it after eight minutes
ENGINE_CONFIGS = ("llama", "qwen2, two windows")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy shapes, on the CPU")
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="start no measurement after so long")
    parser.add_argument("--hard-seconds", type=float, default=HARD_SECONDS, help="end with a failure after so long")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        print("this needs a CUDA device; --tiny runs the same on the CPU with toy shapes", file=sys.stderr)
        return 2
    device = torch.device("cpu") if arguments.tiny else torch.device("cuda")
    if arguments.tiny:
        torch.set_num_threads(1)  # toy shapes lose more to threads than they gain
    report = Report()
    machine = Machine(device, arguments.tiny, time.monotonic() + arguments.seconds)
    name = "CPU" if arguments.tiny else torch.cuda.get_device_name(device)
    report.results |= {"device": name, "torch": torch.__version__, "tiny": arguments.tiny}
    report.line(f"{name}, torch {torch.__version__}")
    with watchdog(report, arguments.json, arguments.hard_seconds):
        with report.guard("parity"):
            parity(machine, report)
        with report.guard("engine"):
            configs = configurations(machine)
            engine_parity(machine, report, {name: configs[name] for name in ENGINE_CONFIGS})
        with report.guard("speed"):
            decode_speed(machine, report)
    return finish(report, arguments.json)


def finish(report: Report, path: Path | None) -> int:
    """Write what is there; the exit status."""
    report.results["ok"] = report.ok
    if path:
        path.write_text(json.dumps(report.results, indent=1) + "\n", encoding="utf-8")
    report.line(f"{len(report.results['parity'])} checks, {report.failures} failed")
    return 0 if report.ok else 1


@contextmanager
def watchdog(report: Report, path: Path | None, seconds: float) -> Iterator[None]:
    """Ends the process when the block takes longer: a thread of its own does it, for a kernel that hangs never returns.

    If not even that thread gets its turn, faulthandler ends the process without it.
    """

    def end() -> None:
        report.check("in time", False, f"still at work after {seconds:.0f} s")
        finish(report, path)
        sys.stdout.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + 10, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    sys.exit(main())
