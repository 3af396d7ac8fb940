"""The numbers of `benchmarks/` are what they say: on small dictionaries and a loopback server, without any peer."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from benchmarks import driver, http_client, report, summary, training
from benchmarks.driver import Options, Point, Process, WorkerDied, schedule, warm_up
from benchmarks.workload import LABEL_TOKENS, Spec, Workload


def run(system: str, rows: int, repeat: int, seconds: float, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"system": system, "rows": rows, "repeat": repeat, "seconds": seconds, "tokens": 10}
    return found | {"ttft": [0.5, 0.1, 0.3], "requests": 2, **more}


def result(*runs: dict[str, Any]) -> dict[str, Any]:
    return {"axes": ["rows"], "runs": list(runs)}


# -- workload ----------------------------------------------------------------------------------------------------------


def test_spec_numbers() -> None:
    assert Spec(rows=8).num_requests == 8
    assert Spec(rows=8, requests=100).num_requests == 100
    assert Spec(rows=1, new=64).capacity == 64
    assert Spec(rows=1, new=8, room=64).capacity == 64
    assert Spec.of({"rows": 3, "work": "score", "unknown": 1}) == Spec(rows=3, work="score")


def test_a_warm_up_has_the_shape_of_the_measurement() -> None:
    point = Point({}, Spec(rows=4, requests=9, new=64, tasks=3), cold=True)
    spec = warm_up(point, 7)
    assert (spec.new, spec.capacity, spec.num_requests) == (driver.WARMUP_TOKENS, 64, 9)
    assert spec.text_seed == spec.prompt_seed == 7
    assert warm_up(Point({}, Spec(rows=1)), 7).prompt_seed == 0


@pytest.fixture
def workload(tmp_path: Path) -> Workload:
    np.save(tmp_path / "table.npy", np.random.default_rng(0).standard_normal((1200, 4)).astype(np.float32))
    np.save(tmp_path / "text_ids.npy", np.arange(500))
    return Workload(tmp_path)


def test_labels_and_texts_come_from_seeds(workload: Workload) -> None:
    spec = Spec(rows=5, tasks=2, text=32, text_seed=1)
    labels = workload.labels(spec)
    assert len(labels) == 77 and {len(label) for label in labels} == set(range(1, LABEL_TOKENS + 1))
    assert labels == workload.labels(Spec(rows=1, text_seed=9))
    requests = workload.requests(spec)
    assert [request.task for request in requests] == [0, 1, 0, 1, 0]
    assert requests == workload.requests(spec) != workload.requests(Spec(rows=5, tasks=2, text_seed=2))
    assert workload.whole(spec, requests[0]).shape == (20 + 32, 4)


# -- summary -----------------------------------------------------------------------------------------------------------


def test_metrics_of_a_run() -> None:
    one = run("a", 1, 0, 2.0, bytes_sent=300, computed=64)
    assert summary.throughput(one) == 5
    assert summary.first_token(one) == pytest.approx(300)
    assert summary.slowest_first_token(one) == pytest.approx(500)
    assert summary.decode_step(one) == pytest.approx(1000 * 1.5 / 9)
    assert summary.METRICS["sent"][1](one) == 150
    assert summary.METRICS["received"][1](one) is None
    assert summary.METRICS["input"][1](one) == 1000
    assert summary.METRICS["computed"][1](one) == 32


def test_ratios_are_taken_within_a_repeat() -> None:
    # Twice as fast in each repeat, though the machine slows down tenfold: medians alone would say something else.
    data = result(
        *(run("slow", 1, i, 2.0 * 10**i) for i in range(3)),
        *(run("fast", 1, i, 1.0 * 10**i) for i in range(3)),
        run("fast", 8, 0, 1.0),  # without its partner
    )
    assert summary.ratios(data, "throughput", "slow") == {(1,): {"slow": 1.0, "fast": pytest.approx(2.0)}}
    assert summary.table(data, "throughput")[(1,)] == {"slow": 0.5, "fast": 1.0}


def test_ratios_over_the_first_point() -> None:
    data = result(*(run("a", rows, i, rows * 3.0**i) for i in range(3) for rows in (1, 4)), run("b", 4, 0, 1.0))
    assert summary.point_ratios(data, "input") == {(1,): {"a": 1.0}, (4,): {"a": pytest.approx(4.0)}}
    assert summary.point_ratios(data, "computed") == {}


def test_agreement() -> None:
    data = result(
        run("http", 1, 0, 1.0, texts=["x"]),  # tells no tokens
        run("int8", 1, 0, 1.0, check=[[1, 9], [3, 9]]),
        run("a", 1, 0, 1.0, check=[[1, 2], [3, 4]]),
        run("b", 1, 0, 1.0, check=[[1, 7], [3, 4]]),
        run("b", 1, 1, 1.0, check=[[1, 7]]),  # the other has no such repeat
    )
    exact = ["http", "a", "b"]
    assert summary.agreement(data, exact) == {"int8": 1.0, "a": 1.0, "b": 1.0}
    assert summary.agreement(data, exact, first=2) == {"int8": 0.0, "a": 1.0, "b": 0.5}
    assert summary.agreement(data, ["http"]) == {}
    assert summary.problems(data, exact) == []


def test_other_work_is_a_problem() -> None:
    data = result(
        run("a", 1, 0, 1.0, check=[[1]], new=4, token_counts=[4]),
        run("b", 1, 0, 1.0, check=[[2]], new=4, token_counts=[3, 4]),
        run("int8", 1, 0, 1.0, check=[[2]], new=4, token_counts=[4]),
    )
    first, second = summary.problems(data, ["a", "b"])
    assert "b gives the same first token as a in 0.0%" in first
    assert "b gave answers of 3 tokens" in second
    assert summary.problems(data | {"failures": ["c died"]}, ["a"])[0] == "c died"


def test_the_report_shouts() -> None:
    data = result(*(run(name, rows, 0, 1.0, texts=["hello"]) for rows in (1, 2) for name in ("a", "b")))
    machine = {"cpu": "x", "cores": 2, "cpu_capability": "x", "threads": 2, "date": "x", "commit": "x"}
    data |= {"experiment": "ttft", "machine": machine | {"load_before": [0.0]}, "systems": {"a": {}, "b": {}}}
    data |= {"metrics": ["ttft"], "baseline": None, "interleaved": True, "problems": ["they differ"]}
    text = report.render(data)
    assert "**NOT COMPARABLE: they differ**" in text
    assert "ratio over rows 1 in the same repeat" in text and "ratio over b" in text
    assert "- a (10 tokens): 'hello'" in text


# -- driver ------------------------------------------------------------------------------------------------------------


def test_systems_take_turns_in_going_first() -> None:
    order = schedule(num_systems=3, num_points=2, repeats=3)
    assert [system for repeat, point, system in order if point == 1] == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert [(repeat, point) for repeat, point, _ in order][::3] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


ECHO = """import json, sys, time
print(json.dumps({"ready": {"version": 1}}), flush=True)
for line in sys.stdin:
    spec = json.loads(line)
    if spec["new"] == 13: print("no room", file=sys.stderr); sys.exit(3)
    if spec["new"] == 14: time.sleep(60)
    if spec["rows"] == 9: print(json.dumps({"error": "one row only"}), flush=True); continue
    print(json.dumps({"seconds": 1.0, "tokens": spec["new"], "ttft": [spec["text_seed"]]}), flush=True)
"""


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Options:
    monkeypatch.setattr(Process, "command", lambda self: [sys.executable, "-S", "-c", ECHO])
    return Options(tmp_path, tmp_path, threads=1, logs=tmp_path, timeout=20)


def test_measure_pairs_runs(options: Options) -> None:
    points = [Point({"new": new}, Spec(rows=1, new=new)) for new in (4, 6)]
    points.append(Point({"new": 5}, Spec(rows=9, new=5)))
    found = driver.measure(["a", "b"], points, 2, options, interleave=True)
    assert found["systems"]["a"]["version"] == 1 and found["failures"] == []
    order = [(entry["repeat"], entry["new"], entry["system"]) for entry in found["runs"]]
    assert order == [
        (repeat, new, name) for repeat, names in enumerate(("ab", "ba")) for new in (4, 6) for name in names
    ]
    seeds = [(entry["repeat"], entry["new"], entry["ttft"][0]) for entry in found["runs"]]
    assert len(set(seeds)) == 4 == len({seed for *_, seed in seeds})  # one a point and repeat, the same for both
    assert len(found["left_out"]) == 2 and "one row only" in found["left_out"][0]


@pytest.mark.parametrize(("new", "reason"), [(13, "no room"), (14, "was ended after")])
def test_a_worker_that_dies_or_hangs_is_told(options: Options, new: int, reason: str) -> None:
    options.timeout = 20 if new == 13 else 1
    process = Process("a", options).start()
    with pytest.raises(WorkerDied, match=reason):
        process.run(Spec(rows=1, new=new))
    assert not process.is_alive and process._process.poll() is not None
    process.close()


def test_measure_goes_on_without_the_dead(options: Options) -> None:
    points = [Point({"new": 4}, Spec(rows=1, new=4)), Point({"new": 13}, Spec(rows=1, new=13))]
    found = driver.measure(["a"], points, 1, options)
    assert [entry["new"] for entry in found["runs"]] == [4]
    assert len(found["failures"]) == 1 and "a at new=13" in found["failures"][0]


def test_llama_cpp_measures_in_the_context_of_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose soft prompts are resident. Points that take turns keep theirs, and new soft prompts push none out."""
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    monkeypatch.delitem(sys.modules, "benchmarks.systems.llama_cpp_batch", raising=False)
    module = importlib.import_module("benchmarks.systems.llama_cpp_batch")
    monkeypatch.delitem(sys.modules, "benchmarks.systems.llama_cpp_batch")
    closed: list[Any] = []

    class Context:
        def __init__(self, _model: Any, spec: Spec, _threads: int) -> None:
            self.cells, self.spec = 256 * (spec.rows + spec.tasks), spec

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr(module, "Context", Context)
    worker = object.__new__(module.LlamaCpp)
    worker._contexts, worker._model, worker.arguments = {}, None, Namespace(threads=1)
    points = [Point({}, Spec(rows=1, virtual=virtual), cold=cold) for virtual in (20, 100) for cold in (False, True)]
    warm = [worker._fitting(warm_up(point, 1)) for point in points]
    assert len(set(warm)) == 4
    for _ in range(2):
        assert [worker._fitting(replace(p.spec, text_seed=9, prompt_seed=9 * p.cold)) for p in points] == warm
    assert not closed
    large = worker._fitting(Spec(rows=module.MAX_CELLS // 256))
    assert closed == warm and list(worker._contexts.values()) == [large]


# -- HTTP --------------------------------------------------------------------------------------------------------------


def chunked(*events: str) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(data), data) for data in (f"data: {event}\n\n".encode() for event in events))
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


USAGE = '{"usage":{"completion_tokens":2}}'
ANSWER = chunked(
    '{"index":0,"text":"hä"}', '{"choices":[{"text":"llo"}]}', '{"choices":[],"usage":null}', USAGE, "[DONE]"
)


@contextmanager
def serving(reply: Callable[[bytes], list[bytes]]) -> Iterator[int]:
    """A server that answers each request with these pieces, one after the other."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            for piece in reply(await reader.readexactly(length)):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.002)

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()
            await asyncio.sleep(0)  # the transport closes in the next turn

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(guarded, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def end() -> None:
        server.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.parametrize("piece", [1000, 7, 3])
def test_streams_are_counted_however_they_are_cut(piece: int) -> None:
    with serving(lambda _: [ANSWER[i : i + piece] for i in range(0, len(ANSWER), piece)]) as port:
        requests = [http_client.post(port, "/v1/generate", b"{}") for _ in range(5)]
        found = http_client.run(port, requests, rows=2)
    assert found["tokens"] == 10 and found["token_counts"] == [2]
    assert found["bytes_sent"] == sum(map(len, requests)) and found["bytes_received"] == 5 * len(ANSWER)
    assert len(found["ttft"]) == 5 and 0 < max(found["ttft"]) < found["seconds"]
    assert found["texts"] == ["hällo"] * 5


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}",
        chunked('{"text":"half"}'),  # neither usage nor [DONE]
        chunked('{"text":""}', "[DONE]"),
    ],
)
def test_what_is_not_a_whole_stream_fails(reply: bytes) -> None:
    with serving(lambda _: [reply]) as port, pytest.raises(http_client.StreamFailed):
        http_client.run(port, [http_client.post(port, "/", b"{}")], rows=1)


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_lane_trains_only_when_told_and_passes_errors_on() -> None:
    done: list[int] = []

    def count(lane: training.Lane) -> None:
        for step in range(100):
            done.append(step)
            if lane.step_ended():
                return
            if step == 5:
                raise ValueError("broken")

    lane = training.Lane(count)
    assert done == []
    for steps in (1, 3):
        before = len(done)
        lane.advance(steps)
        assert len(done) == before + steps
    ended = training.Lane(count)
    ended.advance(2)
    ended.end()
    with pytest.raises(ValueError, match="broken"):
        lane.advance(10)


def test_training_ratios_are_taken_within_pairs() -> None:
    pairs = [{"ours": [1.0, 2.0], "peft": [3.0, 5.0]}, {"ours": [2.0, 1.0], "peft": [2.0, 2.0]}]
    pairs.append({"ours": [4.0, 1.0], "peft": [8.0, 4.0]})
    losses = {"ours": [1.0, 0.5, 0.25], "peft": [1.25, 0.5, 0.75]}
    [line] = training.summary(
        [{"data": "rows", "virtual": 20, "batch": 16, "pairs": pairs, "losses": losses}], steps=2
    )  # fmt: skip
    assert (line["ratio"], line["least"], line["most"], line["cpu_ratio"]) == (2.0, 1.0, 3.0, 2.5)
    assert (line["ours"], line["peft"], line["first_apart"], line["most_apart"]) == (1.0, 2 / 3, 0.25, 0.5)
