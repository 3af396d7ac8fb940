"""`softprompt import` and `softprompt export`: PEFT folders into a registry folder and out of it, without a server."""

from __future__ import annotations

import asyncio
from pathlib import Path

from app.base_model import BaseModel
from app.checkpoint import CONFIG_FILE, DEFAULT_LIMITS, MANIFEST_FILE, TENSORS_FILE, read_checkpoint, read_manifest
from app.client.folder import check_empty, write_folder
from app.config import Settings
from app.errors import InvalidPromptFile, NumericalError
from app.local_engine import local_engine
from app.manifest import ManifestInput
from app.registry import Published, Registry, Store
from app.registry.reference import check_alias_name, check_task_name


def import_folder(task: str, folder: Path, settings: Settings, base: BaseModel, *, alias: str | None) -> Published:
    """Publish what PEFT's save_pretrained wrote, tried on the base model first; a manifest.json beside it counts.

    Raises InvalidPromptFile for what an upload would be refused for, OSError for a folder without the files.
    """
    check_task_name(task)
    if alias is not None:
        check_alias_name(alias)
    manifest = ManifestInput()
    if (folder / MANIFEST_FILE).exists():
        manifest = read_manifest(_read(folder / MANIFEST_FILE))
    checkpoint = read_checkpoint(_read(folder / CONFIG_FILE), _read(folder / TENSORS_FILE), manifest, base.info)
    engine = local_engine(settings, base)
    engine.start()
    try:
        asyncio.run(engine.load(checkpoint.prompt))
    except NumericalError as error:
        raise InvalidPromptFile(error.message, param="adapter_model", code=error.code) from None
    finally:
        engine.stop()
    return Registry(Store(settings.registry), base.info).publish(task, checkpoint, alias=alias, actor="import")


def export_version(reference: str, folder: Path, settings: Settings, base: BaseModel) -> list[Path]:
    """Write the version's files as they came into a folder that is new or empty; PEFT loads it. Raises OSError."""
    check_empty(folder)
    registry = Registry(Store(settings.registry), base.info)
    version = registry.resolve(reference)
    return write_folder(
        folder, {name: registry.read_file(version.task, version.number, name) for name in version.files}
    )


def _read(path: Path) -> bytes:
    limit = DEFAULT_LIMITS.max_file_bytes
    if path.stat().st_size > limit:
        raise InvalidPromptFile(f"{path.name} has more than {limit} bytes", code="file_too_large")
    return path.read_bytes()
