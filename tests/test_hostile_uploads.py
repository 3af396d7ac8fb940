"""Malformed uploads through the real route: 422 with a known code, or a version that is served."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.api_harness import Harness
from tests.long_run import SECONDS, SEED, indices, long_count, report
from tests.prompt_fuzzer import Case, case
from tests.test_api_errors import check
from tests.test_hostile_files import CODES, check_echo

PATH = "/v1/tasks/hostile/versions"
RAW = {"content-type": "application/octet-stream"}
HTTP_CODES = CODES | {"missing_config", "invalid_manifest", "invalid_request", "body_too_large"}


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness.create(tmp_path / "prompts", max_upload_bytes=256 << 10)


@pytest.fixture
def client(harness: Harness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


def send(client: TestClient, given: Case) -> Any:
    manifest = given.manifest.model_dump_json(exclude_defaults=True).encode()
    files = {"adapter_config": given.config, "adapter_model": given.tensors, "manifest": manifest}
    return client.post(f"{PATH}?alias=", files=files)


def run(
    harness: Harness, client: TestClient, seed: int, count: int, seconds: float = float("inf")
) -> Counter[str | None]:
    found: Counter[str | None] = Counter()
    for index in indices(count, seconds):
        given = case(seed, index, harness.base.info)
        reply = send(client, given)
        name = f"case({seed}, {index}), {given.kinds}"
        if reply.status_code in (200, 201):
            found[None] += 1
            stored = client.get(f"{reply.headers['location']}/files/adapter_model.safetensors")
            assert stored.content == given.tensors, name
        else:
            assert reply.status_code in (422, 413), f"{name}: {reply.text[:500]}"
            error = check(reply, reply.status_code)
            assert error["code"] in HTTP_CODES and error["param"] is not None or reply.status_code == 413, name
            check_echo(error["message"], given)
            found[error["code"]] += 1
    assert len(harness.engine.loaded) == found[None], "a refused file never reaches the engine"
    assert not list(Path(harness.settings.registry).rglob("*.tmp")), "nothing half-written is left"
    return found


def test_malformed_uploads(harness: Harness, client: TestClient) -> None:
    found = run(harness, client, SEED, 240)
    assert found[None] > 12 and len(found) > 15, found
    tasks = client.get("/v1/tasks").json()["data"]
    assert [task["task"] for task in tasks] == ["hostile"] and len(tasks[0]["versions"]) <= found[None]


@pytest.mark.long
@pytest.mark.timeout(0)
def test_many_malformed_uploads(harness: Harness, client: TestClient, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(harness, client, SEED, long_count(20_000), SECONDS)
    with capsys.disabled():
        report(f"seed {SEED}, {found.total()} uploads: {found.most_common()}")


def test_malformed_single_files(client: TestClient) -> None:
    """The other form of an upload, with the configuration in the metadata."""
    rng = Random(SEED)
    found: Counter[int] = Counter()
    for index in range(150):
        given = case(SEED, index)
        config = rng.choice((given.config.decode("utf-8", "replace"), "", "{}", "\u202e", '{"peft_type": 1}'))
        length = int.from_bytes(given.tensors[:8], "little")
        header = given.tensors[8 : 8 + length].replace(
            b"{", b'{"__metadata__":{"adapter_config":%s},' % _json(config), 1
        )
        reply = client.post(
            PATH, content=len(header).to_bytes(8, "little") + header + given.tensors[8 + length :], headers=RAW
        )
        assert reply.status_code in (422, 413, 201, 200), f"case({SEED}, {index}): {reply.text[:500]}"
        if reply.status_code >= 400:
            check(reply, reply.status_code)
        found[reply.status_code] += 1
    assert found[422] > 100


def _json(text: str) -> bytes:
    return json.dumps(text).encode()
