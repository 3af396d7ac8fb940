"""The registry's files: PEFT folders and, per task, an append-only log that says which of them exist.

    <root>/<task>/versions/<n>/{adapter_config.json, adapter_model.safetensors, manifest.json}
    <root>/<task>/log/<seq:08d>.json

An entry is created with link(2), which fails if its name is taken: that is the compare-and-swap between
threads and processes. A version's folder without an entry is an upload that nobody was told of. Anything else
in these folders (a README, leftovers of a crash) is ignored. Every call blocks, and raises NotReady or
StorageFull when the file system fails.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from app.errors import PromptCorrupt
from app.registry.durable import make_folder, storage_errors, sync_folder, write_file
from app.registry.log import Entry
from app.registry.reference import is_task_name, not_found

logger = logging.getLogger(__name__)

_ENTRY_NAME = re.compile(r"[0-9]{8,}\.json")
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


def _temporary(folder: Path) -> Path:
    return folder / f".tmp-{secrets.token_hex(8)}"


class Upload:
    """The files of a version on their way in: written aside, then moved to a free number. For one thread."""

    def __init__(self, versions: Path, files: Mapping[str, bytes]) -> None:
        self._versions = versions
        self._files = files
        self._folder: Path | None = None
        self.number: int | None = None  # set by `place`

    def write(self) -> Path:
        """Make the files durable under a temporary name, once, and return the folder."""
        if self._folder is None:
            folder = _temporary(self._versions)
            try:
                with storage_errors():
                    folder.mkdir()
                    for name, data in self._files.items():
                        write_file(folder / name, data)
                    sync_folder(folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._folder = folder
        return self._folder

    def place(self, used: Collection[int]) -> int:
        """Move the folder to a number that is not in `used` and that no other upload holds, and return it."""
        if self.number is not None and self.number not in used:
            return self.number
        folder = self.write()
        number = max(used, default=0)
        with storage_errors():
            while True:
                number += 1
                target = self._versions / str(number)
                try:
                    # NOTE: replaces an empty folder and fails on a full one; every version's folder is full.
                    os.rename(folder, target)
                except OSError as error:
                    if error.errno not in _TAKEN:
                        raise
                else:
                    break
            self._folder, self.number = target, number
            sync_folder(self._versions)
        return number

    def discard(self) -> None:
        """Remove what was written; what cannot be removed stays as an ignored leftover."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class Store:
    """A registry's folder, made if absent."""

    def __init__(self, root: Path) -> None:
        self._root = root
        with storage_errors():
            if not root.is_dir():
                root.mkdir(parents=True, exist_ok=True)
                sync_folder(root.parent)

    def tasks(self) -> list[str]:
        """Names of the folders that may be tasks, in no order."""
        with storage_errors(), os.scandir(self._root) as found:
            return [item.name for item in found if is_task_name(item.name) and item.is_dir()]

    def read_log(self, task: str, after: int) -> list[Entry]:
        """The entries behind sequence number `after`; costs one failing open(2) when there are none.

        Raises PromptCorrupt if one cannot be read or, from the start (`after` 0), if one is missing.
        """
        folder = self._log(task)
        entries: list[Entry] = []
        with storage_errors():
            last = 0 if after else self._last_seq(folder)
            seq = after + 1
            while True:
                try:
                    data = self._entry(folder, seq).read_bytes()
                except (FileNotFoundError, NotADirectoryError):
                    if seq <= last:
                        raise PromptCorrupt(f"entry {seq} is missing") from None
                    return entries
                try:
                    entries.append(Entry.parse(data))
                except ValueError as error:
                    raise PromptCorrupt(f"entry {seq} is damaged") from error
                seq += 1

    def read_entry(self, task: str, seq: int) -> Entry:
        """One entry that is known to exist. Raises PromptCorrupt if it is gone or damaged."""
        with storage_errors():
            try:
                return Entry.parse(self._entry(self._log(task), seq).read_bytes())
            except (FileNotFoundError, NotADirectoryError, ValueError) as error:
                raise PromptCorrupt(f"entry {seq} is missing or damaged") from error

    def append(self, task: str, entry: Entry) -> bool:
        """Create the entry durably. False if another one has its sequence number.

        After an exception the entry may or may not be there: read the log to know.
        """
        folder = self._log(task)
        temporary = _temporary(folder)
        with storage_errors():
            try:
                write_file(temporary, entry.data)
                os.link(temporary, self._entry(folder, entry.seq))
                sync_folder(folder)
            except FileExistsError:
                return False
            finally:
                with suppress(OSError):
                    temporary.unlink()
        return True

    def create(self, task: str) -> None:
        """Make the folders of a new task."""
        with storage_errors():
            for folder in (self._task(task), self._versions(task), self._log(task)):
                make_folder(folder)

    def upload(self, task: str, files: Mapping[str, bytes]) -> Upload:
        """Nothing is written yet."""
        return Upload(self._versions(task), files)

    def read_file(self, task: str, number: int, name: str) -> bytes | None:
        """A file of a version as it is on disk, unchecked; None if there is none.

        The whole file is read: one that is truncated under a memory map would kill the process.
        """
        with storage_errors():
            try:
                return (self._versions(task) / str(number) / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def remove_version(self, task: str, number: int) -> None:
        """Remove the files of a version that the log says is deleted, as far as that succeeds."""
        try:
            shutil.rmtree(self._versions(task) / str(number))
        except OSError as error:
            logger.warning("the files of %s:%d could not all be removed: %s", task, number, error.strerror)

    def _task(self, task: str) -> Path:
        # The last guard before a name becomes a path, whatever the caller has checked.
        if not is_task_name(task):
            raise not_found()
        return self._root / task

    def _versions(self, task: str) -> Path:
        return self._task(task) / "versions"

    def _log(self, task: str) -> Path:
        return self._task(task) / "log"

    def _entry(self, folder: Path, seq: int) -> Path:
        return folder / f"{seq:08d}.json"

    def _last_seq(self, folder: Path) -> int:
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return 0
        return max((int(name[:-5]) for name in names if _ENTRY_NAME.fullmatch(name)), default=0)
