"""`python -m benchmarks.run <experiment> --json out.json`: measure, print a table, write every run as JSON."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.base_model import fetch_base_model
from app.config import default_cache_dir
from benchmarks import machine, memory, report, summary
from benchmarks.driver import Options, Point, measure, say, temporary_logs
from benchmarks.systems import SYSTEMS
from benchmarks.workload import Spec, prepare

QUIET = 0.5  # load average of the last minute
COLD, WARM = "cold", "warm"


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, so that the workers end too
    arguments = _parser().parse_args()
    logs = arguments.logs or temporary_logs()
    logs.mkdir(parents=True, exist_ok=True)
    say(f"logs are in {logs}")
    model = fetch_base_model(arguments.model, cache_dir=default_cache_dir())
    if not (logs / "workload").is_dir():
        prepare(model, logs / "workload")
    options = Options(model, logs / "workload", arguments.threads, logs, arguments.kv_cache_tokens)
    facts = machine.describe() | {"threads": arguments.threads}
    if facts["load_before"][0] > QUIET:
        say(f"the machine is busy (load {facts['load_before'][0]}): these numbers will say little")
    result = EXPERIMENTS[arguments.experiment](arguments, options)
    result = {"experiment": arguments.experiment, "machine": facts, **result}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        say(f"written to {arguments.json}")
    print(report.render(result))
    if result.get("problems"):
        sys.exit(1)


def throughput(arguments: argparse.Namespace, options: Options) -> dict[str, Any]:
    """Tokens/s and time to first token over rows and lengths of the soft prompt. HTTP systems go in here too."""
    points = [
        Point(
            {"virtual": virtual, "rows": rows}, _spec(arguments, rows=rows, virtual=virtual, tasks=arguments.tasks[0])
        )
        for virtual in arguments.virtual
        for rows in arguments.rows
    ]
    return _measure(arguments, options, points, metrics=["throughput", "ttft", "ttft_max"])


def tasks(arguments: argparse.Namespace, options: Options) -> dict[str, Any]:
    """The same requests over one task and over many."""
    rows, virtual = arguments.rows[0], arguments.virtual[0]
    points = [
        Point(
            {"tasks": count},
            _spec(
                arguments, rows=rows, virtual=virtual, tasks=count, requests=arguments.requests or max(arguments.tasks)
            ),
        )
        for count in arguments.tasks
    ]
    return _measure(arguments, options, points, metrics=["throughput", "ttft"], interleave=True)


def ttft(arguments: argparse.Namespace, options: Options) -> dict[str, Any]:
    """Time to first token over the length of the soft prompt, known to the system or new to it."""
    points = [
        Point(
            {"virtual": virtual, "prompt": state},
            _spec(arguments, rows=arguments.rows[0], virtual=virtual, tasks=arguments.tasks[0], new=1),
            cold=state == COLD,
        )
        for virtual in arguments.virtual
        for state in (WARM, COLD)
        if virtual or state == WARM
    ]
    return _measure(arguments, options, points, metrics=["ttft"], interleave=True)


def score(arguments: argparse.Namespace, options: Options) -> dict[str, Any]:
    """Classification of one input at a time among 77 labels, against one prefill of it and against 77."""
    virtual = arguments.virtual[0]
    spec = _spec(arguments, rows=1, virtual=virtual, tasks=arguments.tasks[0], requests=arguments.requests or 4, new=1)
    points = [Point({"work": work}, replace(spec, work=work)) for work in ("generate", "score", "prefills")]
    return _measure(arguments, options, points, metrics=["input", "computed"], interleave=True)


def decode(arguments: argparse.Namespace, options: Options) -> dict[str, Any]:
    """One row: time a token against the time it takes to read the weights once."""
    bandwidth = machine.read_bandwidth(options.threads)
    virtual = arguments.virtual[0]
    points = [Point({"virtual": virtual}, _spec(arguments, rows=1, virtual=virtual, tasks=1))]
    return {"read_bandwidth": bandwidth} | _measure(arguments, options, points, metrics=["step", "throughput"])


EXPERIMENTS: dict[str, Any] = {
    "throughput": throughput,
    "tasks": tasks,
    "ttft": ttft,
    "decode": decode,
    "score": score,
    "memory": memory.per_task,
    "soak": memory.soak,
}
# What each experiment measures unless told otherwise: rows, virtual, tasks, text, new.
DEFAULTS: dict[str, tuple[list[int], list[int], list[int], int, int]] = {
    "throughput": ([1, 8, 32, 64], [20, 100], [8], 32, 64),
    "tasks": ([32], [20], [1, 8, 64, 1000], 32, 16),
    "ttft": ([1], [0, 20, 100, 400], [1], 32, 1),
    "score": ([1], [20], [1], 32, 1),
    "decode": ([1], [20], [1], 32, 64),
    "memory": ([64], [20], [1000], 32, 64),
    "soak": ([16], [20], [8], 8, 2),
}


def _spec(arguments: argparse.Namespace, **fields: int) -> Spec:
    return Spec(**{"text": arguments.text, "new": arguments.new, **fields})


def _measure(
    arguments: argparse.Namespace, options: Options, points: list[Point], metrics: list[str], interleave: bool = False
) -> dict[str, Any]:
    measured = measure(arguments.systems, points, arguments.repeats, options, interleave=interleave)
    exact = [name for name in arguments.systems if SYSTEMS[name].exact]
    result = {"axes": list(points[0].key), "metrics": metrics, "baseline": arguments.baseline, **measured}
    if any(run.get("bytes_sent") for run in measured["runs"]):
        result["metrics"] = [*metrics, "sent", "received"]
    result["agreement"] = summary.agreement(result, exact)
    result["agreement_of_four"] = summary.agreement(result, exact, first=4)
    result["problems"] = summary.problems(result, exact)
    result["workload"] = {"text": arguments.text, "new": arguments.new, "repeats": arguments.repeats}
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    experiments = parser.add_subparsers(dest="experiment", required=True)
    for name, function in EXPERIMENTS.items():
        rows, virtual, tasks_, text, new = DEFAULTS[name]
        each = experiments.add_parser(
            name, help=function.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        each.add_argument("--systems", type=_names, default=["ours-fp32"], help=f"of {', '.join(SYSTEMS)}")
        each.add_argument("--baseline", help="system that the ratios are over (default: the last one)")
        each.add_argument("--rows", type=_numbers, default=rows, help="requests in flight")
        each.add_argument("--virtual", type=_numbers, default=virtual, help="virtual tokens")
        each.add_argument("--tasks", type=_numbers, default=tasks_, help="distinct soft prompts, in turn")
        each.add_argument("--text", type=int, default=text, help="tokens of text in each request")
        each.add_argument("--new", type=int, default=new, help="tokens generated for each")
        each.add_argument("--requests", type=int, help="requests of a run (default: as many as rows or tasks)")
        each.add_argument("--repeats", type=int, default=3)
        each.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        each.add_argument("--model", default="smollm2-135m-instruct", help="as SOFTPROMPT_MODEL")
        each.add_argument("--kv-cache-tokens", type=int, help="of this engine (default: its own)")
        each.add_argument("--logs", type=Path, help="folder for logs and the workload (default: a temporary one)")
        each.add_argument("--json", type=Path, help="file for the result")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SYSTEMS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SYSTEMS)}")
    return names


if __name__ == "__main__":
    main()
