"""File operations that survive power loss once they return, and what their failures mean to a caller."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from app.errors import NotReady, StorageFull

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_FOLDER = os.O_RDONLY | os.O_DIRECTORY


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


class FileSystem:
    """Every call that the store makes to the file system, one method each, and what is made of them.

    The store reaches its files through one of these and nothing else, so that tests can fail, kill or record
    each call. `folder`, where there is one, is an open folder that a relative name is looked up in.
    """

    def open(self, path: Path | str, flags: int, folder: int | None = None) -> int:
        return os.open(path, flags, 0o666, dir_fd=folder)

    def write(self, file: int, data: memoryview) -> int:
        return os.write(file, data)

    def fsync(self, file: int) -> None:
        os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def stat(self, file: int) -> os.stat_result:
        return os.fstat(file)

    def lstat(self, path: Path | str, folder: int | None = None) -> os.stat_result:
        return os.stat(path, dir_fd=folder, follow_symlinks=False)

    def names(self, folder: Path | int) -> list[str]:
        return os.listdir(folder)

    def folders(self, path: Path) -> list[str]:
        with os.scandir(path) as found:
            return [item.name for item in found if item.is_dir()]

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def unlink(self, path: Path | str, folder: int | None = None) -> None:
        os.unlink(path, dir_fd=folder)

    def rmdir(self, path: Path | str, folder: int | None = None) -> None:
        os.rmdir(path, dir_fd=folder)

    def write_file(self, path: Path, data: bytes) -> None:
        """Create a file that must not exist yet; its name is durable only after `sync_folder` of its folder."""
        file = self.open(path, _NEW_FILE)
        try:
            view = memoryview(data)
            while view:
                view = view[self.write(file, view) :]
            self.fsync(file)
        finally:
            self.close(file)

    def make_folders(self, path: Path) -> None:
        """Make a folder and those above it that are missing, each durable before the next."""
        try:
            made = self.make_folder(path)
        except FileNotFoundError:
            self.make_folders(path.parent)
            made = self.make_folder(path)
        if made:
            self.sync_folder(path.parent)
            # NOTE: even if it was there: whoever made it may have died before this.
            self.sync_name(path.parent)

    def make_folder(self, path: Path) -> bool:
        """Make a folder, or return False if there is one; durable only after `sync_folder` of its parent."""
        try:
            self.mkdir(path)
        except FileExistsError:
            return False
        return True

    def sync_folder(self, path: Path) -> None:
        folder = self.open(path, _FOLDER)
        try:
            self.fsync(folder)
        finally:
            self.close(folder)

    def sync_name(self, path: Path) -> None:
        """Make a folder's own name durable, unless its parent is an operator's that we may not open."""
        with suppress(PermissionError):
            self.sync_folder(path.parent)

    def remove(self, path: Path | str, folder: int | None = None, *, unless_after: float = math.inf) -> bool:
        """Remove a file, or a folder with what is in it; not durable.

        False, and nothing is done, if it was changed after `unless_after` (seconds since the epoch).
        """
        # NOTE: what is in a folder is named by its descriptor: another process may move a new upload to this
        # path as soon as it is empty, and must not lose that.
        try:
            opened = self.open(path, _FOLDER | os.O_NOFOLLOW, folder)
        except NotADirectoryError:
            if _changed(self.lstat(path, folder)) > unless_after:
                return False
            self.unlink(path, folder)
            return True
        try:
            if _changed(self.stat(opened)) > unless_after:
                return False
            for name in self.names(opened):
                self.remove(name, opened)
        finally:
            self.close(opened)
        self.rmdir(path, folder)
        return True


def _changed(found: os.stat_result) -> float:
    # The inode's own time too: a folder that is being copied here carries the age of its original.
    return max(found.st_mtime, found.st_ctime)
