"""What users notice of a training job: streams before, while and after one trains, through a kill -9 of its worker.

openai-python does what a user would: a file, a job, its events, an answer of the model that comes out. The job is run
twice with the same seed, the second time killed half-way; the two must end with the same loss and scores.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAI
from openai.types.fine_tuning import FineTuningJob

from benchmarks.machine import describe
from benchmarks.servers import OurServer

DATA = Path(__file__).parent.parent / "examples" / "data" / "sentiment_mixed"
TEMPLATE = "{input}\nSentiment:"
ENDED = ("succeeded", "failed", "cancelled")
ROWS = {"train": 1500, "validation": 48}  # beside 8 streams a job has a sixth of a core, so it is a short one


@dataclass
class Stream:
    """Times of one streamed answer, on the clock of time.monotonic()."""

    asked: float
    chunks: list[float] = field(default_factory=list)


async def keep_asking(client: AsyncOpenAI, model: str, number: int, told: list[Stream], tokens: int) -> None:
    """One user: as soon as an answer ends, the next question."""
    turn = 0
    while True:
        turn += 1
        stream = Stream(time.monotonic())
        told.append(stream)
        prompt = f"User {number} asks question {turn}: how does a river find its way to the sea?"
        extra = {"ignore_eos": True}
        async for _ in await client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True, extra_body=extra
        ):
            stream.chunks.append(time.monotonic())


@asynccontextmanager
async def users(url: str, model: str, count: int, told: list[Stream], tokens: int) -> Any:
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        asking = [asyncio.create_task(keep_asking(client, model, number, told, tokens)) for number in range(count)]
        yield
        for task in asking:
            if task.done():
                task.result()  # a stream that failed is the benchmark's failure
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


def figures(told: list[Stream], begin: float, end: float) -> dict[str, float]:
    """Of what happened between two times: milliseconds, and tokens a second over all streams."""
    first = sorted(s.chunks[0] - s.asked for s in told if s.chunks and begin <= s.chunks[0] < end)
    gaps = sorted(b - a for s in told for a, b in zip(s.chunks, s.chunks[1:], strict=False) if begin <= b < end)
    tokens = sum(begin <= at < end for s in told for at in s.chunks)

    def at(values: list[float], part: float) -> float:
        return round(1000 * values[min(len(values) - 1, int(part * len(values)))], 1)

    return {
        "seconds": round(end - begin, 1),
        "first_token_p50_ms": at(first, 0.5),
        "first_token_p99_ms": at(first, 0.99),
        "between_tokens_p50_ms": at(gaps, 0.5),
        "between_tokens_p99_ms": at(gaps, 0.99),
        "tokens_per_second": round(tokens / (end - begin), 1),
    }


def worker_of(job: str) -> int:
    """The process that has a file of the job's folder open."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                command = (process / "cmdline").read_bytes()
                names = [os.readlink(link) for link in (process / "fd").iterdir()]
            except OSError:
                continue
            if b"train" in command and any(job in name for name in names):
                return int(process.name)
    raise ProcessLookupError(job)


def memory_of(process: int) -> dict[str, int]:
    """MB in all, its share of them, of files that others map too, and of its own (proc_pid_smaps_rollup(5))."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    of_others = kilobytes["Shared_Clean"] + kilobytes["Shared_Dirty"]
    sizes = {"rss": kilobytes["Rss"], "pss": kilobytes["Pss"], "shared": of_others, "own": kilobytes["Rss"] - of_others}
    return {name: size // 1024 for name, size in sizes.items()}


def first_rows(split: str, count: int) -> bytes:
    with (DATA / f"{split}.jsonl").open("rb") as lines:
        return b"".join(itertools.islice(lines, count))


def train(client: OpenAI, model: str, steps: int, on_step: Callable[[FineTuningJob], None]) -> dict[str, Any]:
    """From a file to a model that answers; waits for the end."""
    began = time.monotonic()
    given = {
        name: client.files.create(file=(f"{name}.jsonl", first_rows(name, count)), purpose="fine-tune")
        for name, count in ROWS.items()
    }
    hyperparameters = {"max_steps": steps, "eval_every": max(1, steps // 2), "num_virtual_tokens": 20}
    method: Any = {"type": "prompt_tuning", "prompt_tuning": {"hyperparameters": hyperparameters, "template": TEMPLATE}}
    job = client.fine_tuning.jobs.create(
        model=model, training_file=given["train"].id, validation_file=given["validation"].id, method=method, seed=0
    )
    while job.status not in ENDED:
        time.sleep(1)
        job = client.fine_tuning.jobs.retrieve(job.id)
        on_step(job)
    events = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    if job.status != "succeeded" or job.fine_tuned_model is None:
        raise SystemExit(f"the job ended as {job.status}: {events[:3]}")
    asked = "I love it.\nSentiment:"
    answer = client.completions.create(model=job.fine_tuned_model, prompt=asked, max_tokens=3, temperature=0)
    [checkpoint] = client.fine_tuning.jobs.checkpoints.list(job.id)
    return {
        "seconds": round(time.monotonic() - began, 1),
        "model": job.fine_tuned_model,
        "metrics": job.to_dict().get("metrics"),
        "validation_loss": checkpoint.metrics.valid_loss,
        "restarts": sum("started again" in event for event in events),
        "answer": answer.choices[0].text,
    }


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    server = OurServer.start(arguments.model, arguments.threads, training_threads=1)
    url = f"http://127.0.0.1:{server.port}/v1"
    found: dict[str, Any] = {"machine": describe(), "streams": arguments.streams, "steps": arguments.steps}
    told: list[Stream] = []
    running: list[float] = []
    killed: list[int] = []

    def watch(job: FineTuningJob) -> None:
        if job.status == "running":
            running.append(time.monotonic())
            if job.to_dict().get("step", 0) >= arguments.steps // 2 and "memory_mb" not in found:
                processes = {"server": server.process.pid, "worker": worker_of(job.id)}
                found["memory_mb"] = {name: memory_of(process) for name, process in processes.items()}

    def watch_and_kill(job: FineTuningJob) -> None:
        if not killed and job.to_dict().get("step", 0) >= arguments.steps // 2:
            killed.append(worker_of(job.id))
            os.kill(killed[0], signal.SIGKILL)

    try:
        with OpenAI(base_url=url, api_key="none", timeout=600) as client:
            base = client.models.list().data[0].id
            async with users(url, base, arguments.streams, told, arguments.tokens):
                await asyncio.sleep(arguments.seconds / 4)  # everything is warm then
                begin = time.monotonic()
                await asyncio.sleep(arguments.seconds)
                found["before"] = figures(told, begin, time.monotonic())
                found["job"] = await asyncio.to_thread(train, client, base, arguments.steps, watch)
                found["during"] = figures(told, running[0], running[-1])
                begin = time.monotonic()
                await asyncio.sleep(arguments.seconds)
                found["after"] = figures(told, begin, time.monotonic())
                found["killed_job"] = await asyncio.to_thread(train, client, base, arguments.steps, watch_and_kill)
                assert killed, "the job was over before it could be killed"
    finally:
        server.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="`path` of `softprompt model show --json`")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0, help="before, and after")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = asyncio.run(measure(arguments))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("| | first token, median / p99 | between tokens, median / p99 | tokens a second |\n|---|---|---|---|")
    for when in ("before", "during", "after"):
        row = found[when]
        print(
            f"| {when} | {row['first_token_p50_ms']} / {row['first_token_p99_ms']} ms "
            f"| {row['between_tokens_p50_ms']} / {row['between_tokens_p99_ms']} ms | {row['tokens_per_second']} |"
        )
    print(json.dumps(found["memory_mb"]))
    jobs = [found["job"], found["killed_job"]]
    for job in jobs:
        print(json.dumps(job))
    if any(jobs[0][name] != jobs[1][name] for name in ("validation_loss", "metrics")) or jobs[1]["restarts"] != 1:
        raise SystemExit("the job that was killed did not end as the other, or was not killed")


if __name__ == "__main__":
    main()
