"""A process that changes a registry and is killed for it.

It reads one job a line from its input and forks a process for each, which is quicker than starting one. What it
writes about a job ends with {"done": wait status of each process}; before that come the processes' own lines.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from app.registry import Registry, Store
from tests.checkpoints import BASE, checkpoint
from tests.interposed_files import Killing
from tests.registry_steps import STEPS, content, open_registry

TASKS = ("t0", "t1")


def say(line: dict[str, Any]) -> None:
    # One write, so that a line is whole or absent, between processes too.
    os.write(1, json.dumps(line).encode() + b"\n")


def step(job: dict[str, Any]) -> None:
    """One step, killed at one call unless it has fewer."""
    STEPS[job["step"]].run(open_registry(Path(job["root"]), Killing(job["at"], torn=job["torn"])))
    say({"ack": job["step"]})


def write(job: dict[str, Any], writer: int) -> None:
    """Publish, move the writer's own alias and delete, until killed; each is announced before and after."""
    choose = random.Random(f"{job['seed']}/{writer}")
    registry = Registry(Store(Path(job["root"])), BASE)
    mine: dict[str, list[int]] = {task: [] for task in TASKS}
    for turn in range(10_000):
        task, alias = choose.choice(TASKS), f"w{writer}"
        existing = registry.task(task).aliases.get(alias) if mine[task] else None
        named = existing.version if existing else None
        idle = [number for number in mine[task] if number != named]
        kind = choose.choice(("publish", "publish", "alias", "delete"))
        line: dict[str, Any] = {"writer": writer, "task": task}
        if kind == "alias" and idle:
            line |= {"op": "alias", "version": choose.choice(idle)}
            say(line | {"begin": True})
            registry.move_alias(task, alias, line["version"], expected=existing.etag if existing else None)
        elif kind == "delete" and len(idle) > 1:
            line |= {"op": "delete", "version": choose.choice(idle)}
            say(line | {"begin": True})
            registry.delete_version(task, line["version"])
            mine[task].remove(line["version"])
        else:
            published = checkpoint(1, tags={"by": f"{job['seed']}/{writer}/{turn}"})
            line |= {"op": "publish", "digest": published.prompt.digest}
            say(line | {"begin": True})
            version = registry.publish(task, published, alias=None).version
            mine[task].append(version.number)
            line["version"] = version.number
        say(line)


def fork(work: Any, *args: Any) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        work(*args)
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    for number in range(8):
        content(number)
    say({"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        if "step" in job:
            processes = [fork(step, job)]
        else:
            processes = [fork(write, job, writer) for writer in range(job["writers"])]
            time.sleep(job["seconds"])
            for process in processes:
                os.kill(process, signal.SIGKILL)
        say({"done": [os.waitpid(process, 0)[1] for process in processes]})


if __name__ == "__main__":
    main()
