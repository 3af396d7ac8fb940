"""A look at an installation: what it runs on, what of it is broken, and what to do; then the real model is tried.

Nothing is fetched, changed or sent, but for the native decoder, which is compiled as the first start would.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from app import __version__
from app.config import Settings, load_with_sources
from app.errors import InvalidSettings, SoftpromptError

Status = Literal["ok", "warning", "failed"]

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "fastapi",
    "uvicorn",
    "pydantic",
    "sqlalchemy",
)
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "amx_int8", "asimd")
LOW_MEMORY, LOW_DISK = 2 << 30, 1 << 30  # bytes
NEW_TOKENS = 32


@dataclass(frozen=True)
class Check:
    """What was looked at, how it stands, and one line on what to do where it does not."""

    name: str
    status: Status
    found: str
    advice: str = ""


def examine() -> Iterator[Check]:
    """Every check, each as it is done. What breaks one does not stop the others."""
    yield from _guarded("packages", _packages)
    yield from _guarded("processor", _processor)
    yield from _guarded("memory", _memory)
    settings, check = _settings()
    yield check
    for name, look in (
        ("disk", _disk),
        ("device", _device),
        ("native decoder", _native),
        ("keys", _keys),
        ("port", _port),
        ("registry", _registry),
        ("model", _model),
    ):
        yield from _guarded(name, lambda look=look: look(settings))  # type: ignore[misc]


def _guarded(name: str, look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from look()
    except SoftpromptError as error:
        yield Check(name, "failed", error.message)
    except Exception as error:  # of the environment, whatever it is: that is what is being looked for
        # NOTE: its message may hold anything, a password of a URL too.
        yield Check(name, "failed", f"{type(error).__name__} while looking", "reinstall at the tested versions")


def _packages() -> Iterator[Check]:
    found, missing = [f"softprompt {__version__}", f"python {platform.python_version()}"], []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    yield Check("packages", "ok", ", ".join(found))
    if missing:
        yield Check("packages", "failed", f"missing: {', '.join(missing)}", "install softprompt again")


def _processor() -> Iterator[Check]:
    given = set(_read("/proc/cpuinfo").replace("\t", " ").split())
    flags = [flag for flag in FLAGS if flag in given]
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    limit = f", limited to {int(quota) / int(period):g} by the cgroup" if quota.isdigit() and period.isdigit() else ""
    where = f"{platform.system()} {platform.machine()}, {usable} cores{limit}"
    yield Check("processor", "ok", f"{where}, {' '.join(flags) or 'no flags known'}")


def _memory() -> Iterator[Check]:
    fields = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        left = int(limit) - int(used)
        free = left if free is None else min(free, left)
    if free is None:
        yield Check("memory", "ok", "unknown on this system")
    elif free < LOW_MEMORY:
        yield Check("memory", "warning", f"{_gib(free)} free", "the default model wants about 2 GiB")
    else:
        yield Check("memory", "ok", f"{_gib(free)} free")


def _settings() -> tuple[Settings, Check]:
    """What is wrong is reported, and the defaults stand in for the other checks."""
    try:
        settings, sources = load_with_sources()
    except InvalidSettings as error:
        lines = "; ".join(error.message.splitlines())
        check = Check("settings", "failed", lines, "mend them; the checks below go by the defaults")
        return Settings.model_construct(), check
    given = [name for name, source in sources.items() if source.kind != "default"]
    return settings, Check("settings", "ok", f"set: {', '.join(given)}" if given else "all are the defaults")


def _disk(settings: Settings) -> Iterator[Check]:
    for name, folder in (("cache", settings.cache_dir), ("registry", settings.registry)):
        there = folder.absolute()
        while not there.exists() and there != there.parent:
            there = there.parent
        free = shutil.disk_usage(there).free
        found = f"{name} folder: {_gib(free)} free"
        if not os.access(there, os.W_OK):
            yield Check("disk", "warning", f"{name} folder: not writable", "uploads and downloads would fail")
        elif free < LOW_DISK:
            yield Check("disk", "warning", found, "make room: a converted base model takes 0.6 GB")
        else:
            yield Check("disk", "ok", found)


def _device(settings: Settings) -> Iterator[Check]:
    import torch

    from app.base_model import pick_device, pick_dtype

    device = pick_device(settings.device)
    dtype = str(pick_dtype(settings.dtype, device)).removeprefix("torch.")
    if device.type != "cuda":
        yield Check("device", "ok", f"{device}, {dtype}")
        return
    name = torch.cuda.get_device_name(device)
    try:
        attention = f"FlashInfer {importlib.metadata.version('flashinfer-python')}"
    except importlib.metadata.PackageNotFoundError:
        attention = "no FlashInfer"
    yield Check("device", "ok", f"{device} ({name}), CUDA {torch.version.cuda}, {dtype}, {attention}")


def _native(settings: Settings) -> Iterator[Check]:
    from app.base_model import pick_device
    from app.engine.native.build import NativeUnavailable, find_compiler, load_kernel

    if pick_device(settings.device).type != "cpu":
        yield Check("native decoder", "ok", "not needed on this device")
        return
    try:
        load_kernel(settings.cache_dir / "native")
    except NativeUnavailable as error:
        advice = "install a C compiler (gcc); without it torch runs the model, slower"
        yield Check("native decoder", "warning", str(error), advice)
        return
    try:
        compiler = Path(find_compiler()[0]).name
    except NativeUnavailable:
        compiler = "no compiler, which it no longer needs"
    yield Check("native decoder", "ok", f"compiled and loaded ({compiler})")


def _keys(settings: Settings) -> Iterator[Check]:
    from app.api.hosts import is_loopback

    count = _count_keys(settings) + (settings.api_key is not None)
    if count or is_loopback(settings.host):
        yield Check("keys", "ok", f"there are {count}" if count else "none: open to this machine until the first one")
        return
    advice = "make one with `softprompt keys create`, or listen on 127.0.0.1"
    found = f"{settings.host} is reachable by others, and there is no key"
    if settings.insecure:
        yield Check("keys", "warning", f"{found}, as SOFTPROMPT_INSECURE wants it", advice)
    else:
        yield Check("keys", "failed", found, advice)


def _count_keys(settings: Settings) -> int:
    """Expired and revoked ones among them: they close a server too. Nothing is made or brought up to date."""
    import sqlalchemy

    from app.access import tables
    from app.access.database import Database

    database = Database.of(settings)
    try:
        if not database.exists:
            return 0
        with database.reading() as connection:
            if not sqlalchemy.inspect(connection).has_table(tables.keys.name):
                return 0
            count = connection.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(tables.keys))
            return int(count.scalar_one())
    finally:
        database.close()


def _port(settings: Settings) -> Iterator[Check]:
    from app.api.server import bind

    try:
        bind(settings.host, settings.port, stall_timeout=1.0).close()
    except InvalidSettings as error:
        yield Check("port", "warning", error.message, "another server runs there: stop it, or set SOFTPROMPT_PORT")
        return
    yield Check("port", "ok", f"{settings.host} port {settings.port} is free")


def _registry(settings: Settings) -> Iterator[Check]:
    from app.registry import Registry, Store
    from app.soft_prompt import BaseInfo

    if not settings.registry.exists():
        yield Check("registry", "ok", f"no folder {settings.registry} yet: the first start makes it")
        return
    # The base is for uploads and for loading, which comes later.
    registry = Registry(Store(settings.registry), BaseInfo("", "", "", 0, 0, 0, 0, 0, 0))
    versions = [version for task in registry.tasks() for version in task.versions.values()]
    damaged = []
    for version in versions:
        try:
            for name in version.files:
                registry.read_file(version.task, version.number, name)
        except SoftpromptError:
            damaged.append(version.reference)
    trouble = registry.trouble()
    if damaged:
        advice = "upload them again, or delete them: the others are served"
        yield Check("registry", "warning", f"damaged: {', '.join(damaged)}", advice)
    if trouble:
        yield Check("registry", "warning", trouble, "put its log back from a backup: the other tasks are served")
    yield Check("registry", "ok", f"{len(registry.tasks())} tasks, {len(versions)} versions")


def _model(settings: Settings) -> Iterator[Check]:
    from app.local_engine import load_base, local_engine
    from app.model_source import is_here

    if not is_here(settings.model, cache_dir=settings.cache_dir):
        yield Check("model", "warning", f"{settings.model} is not here yet", "fetch it: softprompt model pull")
        return
    base = load_base(settings)
    yield Check("model", "ok", f"{base.info.name}, {base.info.architecture}, {base.info.fingerprint[:19]}")
    engine = local_engine(settings, base)
    engine.start()  # holds itself to the model's own forward
    try:
        yield Check("parity", "ok", f"{engine.backend} agrees with transformers' own forward")
        yield asyncio.run(_generation(settings, base, engine))
    finally:
        engine.stop()


async def _generation(settings: Settings, base: Any, engine: Any) -> Check:
    """Behind the first prompt that fits the model, or behind none."""
    from app.engine import SamplingParams
    from app.registry import Registry, Store

    prompt, behind, tasks = None, "no prompt", []
    if settings.registry.exists():
        registry = Registry(Store(settings.registry), base.info)
        tasks = registry.tasks()
    for task in tasks:
        reference = f"{task.name}:{max(task.versions)}"
        try:
            prompt, behind = registry.pin(reference).prompt, reference
            await engine.load(prompt)
            break
        except SoftpromptError:
            prompt, behind = None, "no prompt that fits this base model"
    token_ids = base.tokenizer("The weather today is")["input_ids"]
    begun = time.perf_counter()
    times = []
    async for _ in engine.generate(prompt, token_ids, SamplingParams(max_tokens=NEW_TOKENS)):
        times.append(time.perf_counter())
    # The first token also reads the text; of an answer that ends there, it is all there is to time.
    counted, since = (len(times) - 1, times[0]) if len(times) > 1 else (len(times), begun)
    speed = f", {counted / (times[-1] - since):.0f} tokens/s" if times else ""
    return Check("generation", "ok", f"{len(times)} tokens behind {behind}{speed}")


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, ValueError):
        return ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
