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
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from app.errors import PreconditionFailed, ReferenceNotFound
from app.registry import Registry, Store
from app.registry.task import TaskState
from tests.checkpoints import BASE, checkpoint
from tests.interposed_files import Interposed, Killing
from tests.registry_steps import STEPS, content, open_registry

TASKS = ("t0", "t1")
LEFTOVER_GRACE = 3.0  # seconds: longer than an upload takes here, shorter than a run of `mix`
# What `mix` does, and how often.
KINDS = {"publish": 1.0, "move": 2.0, "split": 1.0, "roll_back": 2.0, "delete": 2.0, "restore": 2.0, "read": 2.0}
KINDS |= {"collect": 0.2, "sweep": 0.2}


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


def mix(job: dict[str, Any], process: int) -> None:
    """Threads that all work on one task after another; what they saw goes to a file."""
    registry = Registry(Store(Path(job["root"]), Interposed()), BASE)
    with ThreadPoolExecutor(job["threads"]) as threads:
        workers = [Worker(registry, f"{process}.{thread}", job) for thread in range(job["threads"])]
        for done in [threads.submit(worker.work) for worker in workers]:
            done.result()
    history = [line for worker in workers for line in worker.history]
    Path(f"{job['root']}.{process}").write_text(json.dumps(history))


class Worker:
    """One thread of `mix`."""

    def __init__(self, registry: Registry, name: str, job: dict[str, Any]) -> None:
        self.history: list[dict[str, Any]] = []
        self._registry = registry
        self._name = name
        self._choose = random.Random(f"{job['seed']}/{name}")
        self._operations = job["operations"]
        self._per_task = job["per_task"]

    def work(self) -> None:
        for turn in range(self._operations):
            self._turn(f"t{turn // self._per_task}", f"{self._name}.{turn}")

    def _turn(self, task: str, actor: str) -> None:
        state = self._registry._index._snapshot.states.get(task) or TaskState.empty(task)
        alias, version = self._choose.choice("ab"), self._choose.choice([*state.task.versions, 1])
        known = state.task.aliases.get(alias)
        etag = known.etag if known else None
        kind = self._choose.choices(list(KINDS), list(KINDS.values()))[0]
        arguments: tuple[Any, ...] = ()
        result: Any = None
        called = time.monotonic_ns()
        try:
            match kind:
                case "publish":
                    arguments = (self._choose.choice((alias, None)),)
                    made = checkpoint(1, tags={"by": actor})
                    published = self._registry.publish(task, made, alias=arguments[0], actor=actor)
                    result = published.version.number, published.alias and published.alias.etag
                case "move":
                    arguments = (alias, [version], etag)
                    result = self._registry.move_alias(task, alias, version, expected=etag, actor=actor).etag
                case "split":
                    versions = sorted({version, self._choose.choice([*state.task.versions, 1])})
                    arguments = (alias, versions, etag)
                    weights = dict.fromkeys(versions, 1.0)
                    result = self._registry.move_alias(task, alias, weights, expected=etag, actor=actor).etag
                case "roll_back":
                    arguments = (alias, etag or 0)
                    result = self._registry.roll_back_alias(task, alias, expected=etag or 0, actor=actor).etag
                case "delete":
                    arguments = (version,)
                    self._registry.delete_version(task, version, actor=actor)
                    result = True
                case "restore":
                    arguments = (self._choose.choice([*state.deleted, version]),)
                    self._registry.restore_version(task, arguments[0], actor=actor)
                    result = True
                case "read":
                    seen = self._registry._index.catch_up(task)
                    aliases = [(a.name, sorted(a.target.numbers), a.etag) for a in seen.task.aliases.values()]
                    result = [*seen.task.versions], aliases, [*seen.deleted]
                case "collect":
                    # Of every task: each version is an operation of its own.
                    for reference in self._registry.collect(retention=0):
                        of, _, number = reference.partition(":")
                        self._note(of, "collector", called, kind, (int(number),), True)
                    return
                case "sweep":
                    self._registry.sweep(grace=LEFTOVER_GRACE)
                    return
        except (PreconditionFailed, ReferenceNotFound):
            pass
        self._note(task, actor, called, kind, arguments, result)

    def _note(self, task: str, actor: str, called: int, kind: str, arguments: tuple[Any, ...], result: Any) -> None:
        ended = time.monotonic_ns()
        self.history.append(
            {
                "task": task,
                "actor": actor,
                "call": called,
                "end": ended,
                "name": kind,
                "arguments": arguments,
                "result": result,
            }
        )


def fork(work: Any, *args: Any) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        # NOTE: torch makes its pool anew after a fork, and threads that are the first to need it race for it.
        torch.set_num_threads(1)
        work(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    for number in range(8):
        content(number)
    say({"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        if "threads" in job:
            processes = [fork(mix, job, process) for process in range(job["processes"])]
        elif "step" in job:
            processes = [fork(step, job)]
        else:
            processes = [fork(write, job, writer) for writer in range(job["writers"])]
            time.sleep(job["seconds"])
            for process in processes:
                os.kill(process, signal.SIGKILL)
        say({"done": [os.waitpid(process, 0)[1] for process in processes]})


if __name__ == "__main__":
    main()
