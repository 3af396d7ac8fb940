"""File operations that survive power loss once they return, and what their failures mean to a caller."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import NotReady, StorageFull

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn an OSError into StorageFull or NotReady, whose messages name the cause and no path."""
    try:
        yield
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else type(error).__name__
        if error.errno in _FULL:
            raise StorageFull(f"the registry's storage is full: {cause}") from error
        raise NotReady(f"the registry's storage failed: {cause}") from error


def write_file(path: Path, data: bytes) -> None:
    """Create a file that must not exist yet; its name is durable only after `sync_folder` of its folder."""
    with open(path, "xb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Make a folder if it is absent; its parent must exist."""
    path.mkdir(exist_ok=True)
    # NOTE: synced even when it was there: whoever made it may have died before doing so.
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
