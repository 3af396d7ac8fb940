"""What every test gets: no hub, no settings from outside, and the default base model where it can be had."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest

from tests.registry_parent import Child

# What takes long to import is imported where it is used: the process that only hands out tests needs none of it.
if TYPE_CHECKING:
    from app.base_model import BaseModel

# The same examples in every run: a red one is about the change. `--hypothesis-profile=random` explores.
hypothesis.settings.register_profile("default", derandomize=True, deadline=None)
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models lose more to threads than they gain, and sums come out the same every time."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _shared_routes() -> None:
    from tests.shared_routes import share_routes

    share_routes()


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from app.config import PREFIX

    for name in list(os.environ):
        if name.upper().startswith(PREFIX) or name == "PORT":
            monkeypatch.delenv(name)
    monkeypatch.setattr("app.setting_sources.ENV_FILE", Path("/nonexistent/.env"))


@pytest.fixture(scope="session")
def default_base() -> BaseModel:
    """The default base model, in float32 on the CPU. Tests that use it carry the marker `model`."""
    from app.base_model import fetch_base_model, load_base_model
    from app.config import Settings
    from app.errors import InvalidBaseModel
    from app.model_source import DEFAULT_MODEL

    cache_dir = Settings.load().cache_dir  # as it is said outside: no test has begun
    try:
        fetch_base_model(DEFAULT_MODEL, cache_dir=cache_dir)
    except InvalidBaseModel as error:
        pytest.skip(f"the default base model is not in the cache and cannot be fetched: {error}")
    return load_base_model(DEFAULT_MODEL, cache_dir=cache_dir, device="cpu")


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """As `tmp_path`, in memory where the system has such a folder: for thousands of small files."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def registry_child() -> Iterator[Child]:
    child = Child()
    yield child
    child.close()


@pytest.fixture
def anyio_backend() -> str:
    """Asynchronous tests (marked `anyio`) run on asyncio, as uvicorn does, whatever else is installed."""
    return "asyncio"
