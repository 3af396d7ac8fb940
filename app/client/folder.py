"""A PEFT folder on this side: read to be uploaded, written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

MANIFEST = "manifest.json"
PARTS = {  # of an upload
    "adapter_config": "adapter_config.json",
    "adapter_model": "adapter_model.safetensors",
    "manifest": MANIFEST,
}


def read_folder(folder: Path, manifest: Path | None = None) -> dict[str, tuple[str, bytes]]:
    """The parts of an upload; manifest.json counts where there is one. Raises OSError."""
    files = {part: folder / name for part, name in PARTS.items()}
    if manifest is not None:
        files["manifest"] = manifest
    elif not files["manifest"].exists():
        del files["manifest"]
    return {part: (PARTS[part], path.read_bytes()) for part, path in files.items()}


def check_empty(folder: Path) -> None:
    """Raises OSError unless the folder is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(errno.EEXIST, "is there, and is no empty folder", str(folder))


def write_folder(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write a folder that is new or empty: under another name, synced, then renamed. Raises OSError."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}-{secrets.token_hex(8)}")
    draft.mkdir()
    try:
        for name, data in files.items():
            with open(draft / name, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            folder.rmdir()  # fails, rightly, if there is something in it
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return [folder / name for name in files]
