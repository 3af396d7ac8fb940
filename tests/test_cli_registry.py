"""`softprompt import` and `softprompt export` on a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from app.base_model import load_base_model
from app.cli import main
from app.errors import InvalidPromptFile, InvalidRequest, ReferenceNotFound
from app.registry import Registry, Store
from tests.shared_kernel import share_kernel
from tests.tiny import save_tiny

runner = CliRunner()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_tiny(tmp_path / "tiny", "llama")
    share_kernel(tmp_path / "cache")
    monkeypatch.setenv("SOFTPROMPT_MODEL", str(tmp_path / "tiny"))
    monkeypatch.setenv("SOFTPROMPT_REGISTRY", str(tmp_path / "prompts"))
    monkeypatch.setenv("SOFTPROMPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SOFTPROMPT_KV_CACHE_TOKENS", "4096")
    return tmp_path


def peft_folder(path: Path, value: float = 0.5) -> Path:
    path.mkdir()
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "unknown": 1}
    (path / "adapter_config.json").write_text(json.dumps(config))
    (path / "adapter_model.safetensors").write_bytes(save({"prompt_embeddings": torch.full((4, 32), value)}))
    return path


def run(*arguments: object) -> str:
    result = runner.invoke(main.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_there_and_back_again(home: Path) -> None:
    folder = peft_folder(home / "peft")
    (folder / "manifest.json").write_text(json.dumps({"labels": ["x", "y"]}))
    output = run("import", "mood", folder, "--alias", "prod")
    assert "published mood:1  sha256:" in output and "unknown" in output, "what has no effect is said"
    registry = Registry(Store(home / "prompts"), load_base_model(str(home / "tiny"), cache_dir=home / "cache").info)
    version = registry.resolve("mood@prod")
    assert version.manifest.labels == ["x", "y"] and set(registry.task("mood").aliases) == {"prod"}
    assert "was published before as mood:1" in run("import", "mood", folder)
    written = run("export", "mood@prod", home / "out").split()
    assert len(written) == 3
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (home / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert "was published before as mood:1" in run("import", "mood", home / "out")
    document = json.loads(run("import", "mood", home / "out", "--json"))
    assert (document["reference"], document["created"]) == ("mood:1", False)
    assert len(json.loads(run("export", "mood", home / "again", "--json"))["files"]) == 3


def test_refusals(home: Path) -> None:
    folder = peft_folder(home / "peft", float("nan"))
    with pytest.raises(InvalidPromptFile, match="finite"):
        run("import", "mood", folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        run("import", "mood", folder)
    with pytest.raises(InvalidRequest):
        run("import", "No Name", folder)
    with pytest.raises(ReferenceNotFound):
        run("export", "mood", home / "out")
    run("import", "mood", peft_folder(home / "good"))
    with pytest.raises(FileExistsError, match="no empty folder"):
        run("export", "mood", home / "good")
