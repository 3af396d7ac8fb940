"""A folder of items: each a folder of its own that appears whole, and whose files are replaced whole."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from app.jobs.names import Kind, check_id, is_id
from app.registry.durable import FileSystem, storage_errors

logger = logging.getLogger(__name__)

TEMPORARY = ".tmp-"
GRACE = 3600.0  # seconds: no write takes that long, so what is older is a leftover


class Folders:
    """Items of one kind. Nothing is made before the first; every call that touches files blocks.

    A failing file system raises NotReady, a full one StorageFull.
    """

    def __init__(self, root: Path, kind: Kind, fs: FileSystem | None = None) -> None:
        self.root = root
        self.fs = fs or FileSystem()
        self._kind = kind

    def path(self, item: str) -> Path:
        """Raises ReferenceNotFound for what is no id: the last guard before a name becomes a path."""
        check_id(self._kind, item)
        return self.root / item

    def ids(self) -> list[str]:
        """The newest first."""
        with storage_errors():
            try:
                names = self.fs.folders(self.root)
            except FileNotFoundError:
                return []
        return sorted((name for name in names if is_id(self._kind, name)), reverse=True)

    def read(self, item: str, name: str) -> bytes | None:
        with storage_errors():
            try:
                return self.fs.read(self.path(item) / name)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def create(self, item: str, fill: Callable[[Path], None]) -> None:
        """Make an item durably, all of what `fill` writes or nothing."""
        with storage_errors():
            self.fs.make_folders(self.root)
            draft = self.root / f"{TEMPORARY}{secrets.token_hex(8)}"
            self.fs.mkdir(draft)
            try:
                fill(draft)
                self.fs.sync_folder(draft)
                self.fs.rename(draft, self.path(item))
            except BaseException:
                with suppress(OSError):
                    self.fs.remove(draft)
                raise
            self.fs.sync_folder(self.root)

    def replace(self, item: str, name: str, data: bytes) -> None:
        """Give a file other content durably; whoever reads it finds the old one or the new one."""
        folder = self.path(item)
        draft = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
        with storage_errors():
            try:
                self.fs.write_file(draft, data)
                self.fs.rename(draft, folder / name)
            except BaseException:
                with suppress(OSError):
                    self.fs.unlink(draft)
                raise
            self.fs.sync_folder(folder)

    def remove(self, item: str) -> None:
        """It is gone at once, whatever becomes of what was in it."""
        doomed = self.root / f"{TEMPORARY}{secrets.token_hex(8)}"
        with storage_errors():
            with suppress(FileNotFoundError):
                self.fs.rename(self.path(item), doomed)
                self.fs.sync_folder(self.root)
                self.fs.remove(doomed)

    def sweep(self, *, grace: float = GRACE) -> None:
        """Remove what writers that died have left."""
        try:
            leftovers = [name for name in self.fs.folders(self.root) if name.startswith(TEMPORARY)]
        except OSError:
            return
        for name in leftovers:
            try:
                self.fs.remove(self.root / name, unless_after=time.time() - grace)
            except OSError as error:
                logger.warning("a leftover of training could not be removed: %s", error.strerror)
