"""The whole server on a tiny model: a checkpoint that PEFT saved, over HTTP, against PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from starlette.testclient import TestClient

from app.config import Settings
from app.engine.local import LocalEngine
from app.main import create_app
from app.registry import Registry, Store
from app.text import Template
from app.train import Recipe, Row
from app.train.trainer import train
from tests.api_harness import events, wait_until
from tests.peft_oracle import oracle_generate, oracle_logits, save_adapter
from tests.tiny import tiny_base

BASE = tiny_base("llama")
TEXTS = ["the first one", "and another text", "x"]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end") / "prompts"


@pytest.fixture(scope="module")
def registry(root: Path) -> Registry:
    return Registry(Store(root), BASE.info)


@pytest.fixture(scope="module")
def client(root: Path, registry: Registry) -> Iterator[TestClient]:
    engine = LocalEngine(BASE.model, BASE.info, max_num_seqs=8, kv_cache_tokens=4096)
    engine.start()
    settings = Settings(registry=root, allowed_hosts=("*",))
    with TestClient(create_app(settings, engine, registry, BASE)) as client:
        yield client


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("peft")
    kinds = {"multipart": "PROMPT_TUNING", "raw": "PREFIX_TUNING"}
    return {how: save_adapter(BASE.model, root / how, kind, 5, seed=i) for i, (how, kind) in enumerate(kinds.items())}


@pytest.fixture(scope="module", autouse=True)
def published(client: TestClient, folders: dict[str, Path]) -> None:
    """PEFT's two files, as two parts and as one file with the configuration in its metadata."""
    config, model = "adapter_config.json", "adapter_model.safetensors"
    folder = folders["multipart"]
    parts = {"adapter_config": (folder / config).read_bytes(), "adapter_model": (folder / model).read_bytes()}
    reply = client.post("/v1/tasks/multipart/versions", files=parts)
    assert reply.status_code == 201, reply.text
    folder = folders["raw"]
    with safe_open(folder / model, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    body = save(tensors, metadata={"adapter_config": (folder / config).read_text()})
    reply = client.post("/v1/tasks/raw/versions", content=body, headers={"content-type": "application/octet-stream"})
    assert reply.status_code == 201, reply.text


def expected(folder: Path, text: str) -> str:
    ids = oracle_generate(BASE.model, folder, BASE.tokenizer(text)["input_ids"], NUM_TOKENS)
    end = next((i for i, token in enumerate(ids) if token in BASE.eos_token_ids), len(ids))
    decoded: str = BASE.tokenizer.decode(ids[:end], skip_special_tokens=True)
    return decoded


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # PEFT, of itself
@pytest.mark.parametrize("task", ["multipart", "raw"])
def test_text_is_what_peft_generates(
    client: TestClient, registry: Registry, folders: dict[str, Path], task: str
) -> None:
    body = {"task": task, "input": TEXTS, "max_tokens": NUM_TOKENS}
    outputs = client.post("/v1/generate", json=body).json()["outputs"]
    assert [output["text"] for output in outputs] == [expected(folders[task], text) for text in TEXTS]
    streamed = events(client.post("/v1/generate", json={**body, "stream": True}).text)
    for index, output in enumerate(outputs):
        assert "".join(e["text"] for e in streamed if e.get("index") == index) == output["text"]
    version = registry.resolve(task)
    wait_until(lambda: registry.pins(version) == 0)


@pytest.mark.parametrize("task", ["multipart", "raw"])
def test_probabilities_are_what_peft_computes(
    client: TestClient, registry: Registry, folders: dict[str, Path], task: str
) -> None:
    labels = ["positive", "negative", "on"]
    reply = client.post("/v1/classify", json={"task": task, "input": TEXTS, "labels": labels})
    for text, result in zip(TEXTS, reply.json()["results"], strict=True):
        prompt, scores = BASE.tokenizer(text)["input_ids"], []
        for label in labels:
            tokens = BASE.tokenizer(label)["input_ids"]
            logits = oracle_logits(BASE.model, folders[task], [*prompt, *tokens]).log_softmax(-1)
            scores.append(sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens)))
        probabilities = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
        assert list(result["probabilities"].values()) == pytest.approx(probabilities, abs=1e-4)
        assert result["label"] == labels[probabilities.index(max(probabilities))]
    version = registry.resolve(task)
    wait_until(lambda: registry.pins(version) == 0)


def test_context_length_to_the_token(client: TestClient) -> None:
    num_text = len(BASE.tokenizer("x" * 100)["input_ids"])
    room = BASE.info.max_model_len - 5 - num_text
    body = {"task": "raw", "input": "x" * 100}
    assert client.post("/v1/generate", json={**body, "max_tokens": room}).status_code == 200
    reply = client.post("/v1/generate", json={**body, "max_tokens": room + 1})
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "context_length_exceeded"
    assert client.post("/v1/generate", json={"task": "raw", "input": "x" * 600}).status_code == 400


def test_empty_input(client: TestClient) -> None:
    reply = client.post("/v1/generate", json={"input": ["x", ""]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_no_byte_of_the_base_changes_under_uploading_serving_and_training(
    client: TestClient, folders: dict[str, Path], tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in BASE.model.state_dict().items()}
    for how, folder in folders.items():
        files = {"adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors"}
        parts = {part: (folder / name).read_bytes() for part, name in files.items()}
        assert client.post(f"/v1/tasks/frozen-{how}/versions", files=parts).status_code == 201
        body = {"task": f"frozen-{how}", "input": TEXTS}
        assert client.post("/v1/generate", json=body | {"max_tokens": 4}).status_code == 200
        assert client.post("/v1/classify", json=body | {"labels": ["yes", "no"]}).status_code == 200
    rows = [Row("a", "yes"), Row("b", "no")]
    recipe = Recipe(num_virtual_tokens=3, max_steps=2, warmup_steps=0, batch_size=2)
    train(BASE.model, BASE.tokenizer, rows, rows, Template("{input}:"), recipe, tmp_path, base_name="tiny")
    after = BASE.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in BASE.model.parameters())
