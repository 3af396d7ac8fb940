"""Inspection over HTTP: bounded in memory, in the size of its reply, and in what it takes from other requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from starlette.testclient import TestClient
from torch.utils._python_dispatch import TorchDispatchMode

from app import inspection
from app.api import inspection as route
from app.api.deps import MAX_WAITING_INSPECTIONS
from app.api.registry_schemas import InspectReply
from app.inspection import Mean, Means, virtual_tokens
from app.soft_prompt import SoftPrompt
from tests.access_harness import KeyedHarness
from tests.api_harness import NUM_VIRTUAL_TOKENS, Harness, files

INSPECT = "/v1/tasks/a/versions/1/inspect"


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    harness = Harness.create(tmp_path / "prompts")
    for number, task in enumerate("abc", 1):
        harness.publish(task, number / 10)
    return harness


@pytest.fixture
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_neighbours_are_found_part_by_part() -> None:
    """A long prompt's similarities to a large vocabulary were gigabytes. The parts do not fit the sizes here."""
    torch.manual_seed(0)
    rows, table = 2 * inspection.ROWS_PART + 5, 3 * inspection.VOCABULARY_PART + 7
    prompt = SoftPrompt("embedding", torch.randn(rows, 8), "sha256:" + "0" * 64)
    embedding = torch.randn(table, 8)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        found = virtual_tokens(prompt, embedding, str, neighbors=3)
    assert largest.elements <= inspection.ROWS_PART * inspection.VOCABULARY_PART < rows * table / 4
    cosines = F.normalize(prompt.tensor, dim=1) @ F.normalize(embedding, dim=1).T
    best = cosines.topk(3, dim=1)
    assert [[near["id"] for near in token["nearest"]] for token in found] == best.indices.tolist()
    for token, values in zip(found, best.values.tolist(), strict=True):
        assert [near["similarity"] for near in token["nearest"]] == pytest.approx(values, abs=2e-6)
    few = virtual_tokens(prompt, embedding[:2], str, neighbors=3)
    assert {len(token["nearest"]) for token in few} == {2}


def test_the_reply_is_what_the_schema_says_and_made_in_the_thread(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And sent as it was made: to validate it and make it once more would take the event loop seconds."""
    made: list[tuple[str, str]] = []

    def dumps(*args: Any, **arguments: Any) -> str:
        made.append((threading.current_thread().name, json.dumps(*args, **arguments)))
        return made[0][1]

    monkeypatch.setattr(route, "json", SimpleNamespace(dumps=dumps))
    reply = client.get(INSPECT)
    assert reply.headers["content-type"] == "application/json"
    body = InspectReply.model_validate_json(reply.content, strict=True)
    assert len(body.virtual_tokens) == NUM_VIRTUAL_TOKENS and len(body.virtual_tokens[0].nearest or ()) == 5
    assert made == [("AnyIO worker thread", reply.text)]


def test_the_size_of_the_reply_is_bounded(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "MAX_NEAR", 4 * NUM_VIRTUAL_TOKENS + 1)
    assert client.get(f"{INSPECT}?neighbors=4").status_code == 200
    reply = client.get(f"{INSPECT}?neighbors=5")
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "neighbors"
    assert reply.json()["detail"] == "neighbors: at most 4 for the 4 virtual tokens of this version"
    monkeypatch.setattr(route, "MAX_NEAR", 1)
    assert client.get(f"{INSPECT}?neighbors=1").status_code == 200, "however long it is, one can be had"


def test_one_at_a_time_and_few_wait(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Semaphore(0), threading.Event()

    def slowly(*_: Any, **__: Any) -> list[Any]:
        inside.release()
        assert go_on.wait(60)
        return []

    monkeypatch.setattr(inspection, "virtual_tokens", slowly)
    with ThreadPoolExecutor(48) as threads:
        replies = [threads.submit(client.get, INSPECT) for _ in range(48)]
        try:
            assert inside.acquire(timeout=60)
            body = {"task": "a", "input": "x"}
            for _ in range(3):
                assert client.post("/v1/generate", json=body, headers={"X-Request-Timeout": "20"}).status_code == 200
            assert not inside.acquire(timeout=0.1)
        finally:
            go_on.set()
        statuses = [reply.result(60).status_code for reply in replies]
    assert statuses.count(200) == 1 + MAX_WAITING_INSPECTIONS and statuses.count(503) == 47 - MAX_WAITING_INSPECTIONS


# ---- Similar prompts of other tasks ----


def similar(client: TestClient, **headers: str) -> list[str]:
    reply = client.get(INSPECT, headers=headers)
    assert reply.status_code == 200, reply.text
    return sorted(item["reference"] for item in reply.json()["similar"])


def test_what_the_caller_may_not_see_takes_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "MAX_COMPARED", 2)
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    for number, task in enumerate(("a", "b1", "b2", "b3", "c1", "c2", "c3"), 1):
        harness.publish(task, number / 10)
    headers = harness.key("prompts:read", tasks=["a", "c*"])
    with harness.client() as client:
        assert similar(client, **headers) == ["c1:1", "c2:1"]


def test_a_canary_is_the_version_with_the_largest_share(harness: Harness, client: TestClient) -> None:
    for _ in range(2):
        harness.publish("b", 0.7)
    etag = harness.registry.task("b").aliases["latest"].etag
    harness.registry.move_alias("b", "latest", {1: 0.6, 2: 0.4}, expected=etag)
    for _ in range(20):
        assert similar(client) == ["b:1", "c:1"]


def test_what_is_compared_pushes_nothing_out_of_memory_and_is_read_once(
    harness: Harness, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = harness.registry.read_prompt(harness.registry.version("a", 1)).num_bytes
    harness.registry._prompts._max_bytes = size
    harness.registry.pin("c").release()
    reads: list[str] = []
    load = harness.registry._files.load

    def note(version: Any) -> SoftPrompt:
        reads.append(version.reference)
        return load(version)

    monkeypatch.setattr(harness.registry._files, "load", note)
    for _ in range(3):
        assert similar(client) == ["b:1", "c:1"]
    assert reads == ["a:1", "b:1", "a:1", "a:1"]
    version = harness.registry.version("c", 1)
    pin = harness.registry.pin_in_memory(version)
    assert pin is not None
    pin.release()


def test_means_are_bounded() -> None:
    prompts = {str(i): SoftPrompt("embedding", torch.full((2, 4), float(i)), str(i)) for i in range(4)}
    means = Means(max_bytes=2 * 4 * 4)
    reads: list[str] = []

    def get(digest: str) -> Mean:
        def read() -> SoftPrompt:
            reads.append(digest)
            return prompts[digest]

        return means.get(digest, read)

    for digest in ("0", "1", "0", "2", "0", "1"):
        assert get(digest).vector.tolist() == [float(digest)] * 4
    assert reads == ["0", "1", "2", "1"]


def test_a_prompt_that_cannot_be_read_is_left_out(harness: Harness, client: TestClient) -> None:
    (harness.settings.registry / "b/versions/1/adapter_model.safetensors").write_bytes(files()["adapter_model"])
    assert similar(client) == ["c:1"]
    given = files()
    given["adapter_model"] = save({"prompt_embeddings": torch.zeros(NUM_VIRTUAL_TOKENS, 32)})
    assert client.post("/v1/tasks/zero/versions", files=given).status_code == 201
    assert similar(client) == ["c:1", "zero:1"]
