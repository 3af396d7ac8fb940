"""The registry's files: PEFT folders and, per task, an append-only log that says which of them exist.

    <root>/<task>/versions/<n>/{adapter_config.json, adapter_model.safetensors, manifest.json}
    <root>/<task>/log/<seq:08d>.json

An entry is created with link(2), which fails if its name is taken: that is the compare-and-swap between
threads and processes. A version's folder without an entry is an upload that nobody was told of, or one whose entry
was lost; `Cleaner` has it removed in time, with whatever else a crash left. Anything else in these folders (a
README) is ignored. Every call blocks, and raises NotReady or StorageFull when the file system fails.

The log's chain shows a changed entry and one that is lost before others. A start cannot see the loss of its last
ones: the task is then as it was before them, and their versions' folders look like uploads that nobody was told of. A
process that knew them refuses to write on.
"""

from __future__ import annotations

import errno
import logging
import math
import re
import secrets
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from app.errors import PromptCorrupt
from app.registry.durable import FileSystem, storage_errors
from app.registry.log import Entry, sha256
from app.registry.reference import is_task_name, not_found

logger = logging.getLogger(__name__)

GRACE = 3600.0  # seconds: no write takes that long, so what is older and unknown to the log is a leftover

_ENTRY_NAME = re.compile(r"[0-9]{8,}\.json")
_VERSION_NAME = re.compile(r"[1-9][0-9]*")
_TEMPORARY = ".tmp-"
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


def _temporary(folder: Path) -> Path:
    return folder / f"{_TEMPORARY}{secrets.token_hex(8)}"


class Upload:
    """The files of a version on their way in: written aside, then moved to a free number. For one thread."""

    def __init__(self, fs: FileSystem, versions: Path, files: Mapping[str, bytes]) -> None:
        self._fs = fs
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
                    self._fs.mkdir(folder)
                    for name, data in self._files.items():
                        self._fs.write_file(folder / name, data)
                    self._fs.sync_folder(folder)
            except BaseException:
                # NOTE: after a failed fsync the kernel may take what was lost for written: never go on with it.
                with suppress(OSError):
                    self._fs.remove(folder)
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
                    self._fs.rename(folder, target)
                except OSError as error:
                    if error.errno not in _TAKEN:
                        raise
                else:
                    break
            self._folder, self.number = target, number
            self._fs.sync_folder(self._versions)
        return number

    def discard(self) -> None:
        """Remove what was written; what cannot be removed is left to `Store.sweep`."""
        if self._folder is not None:
            with suppress(OSError):
                self._fs.remove(self._folder)


class Store:
    """A registry's folder, made if absent."""

    def __init__(self, root: Path, fs: FileSystem | None = None) -> None:
        self._root = root
        self._fs = fs or FileSystem()
        with storage_errors():
            self._fs.make_folders(root)

    def tasks(self) -> list[str]:
        """Names of the folders that may be tasks, in no order."""
        with storage_errors():
            return [name for name in self._fs.folders(self._root) if is_task_name(name)]

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
                    data = self._fs.read(self._entry(folder, seq))
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
                return Entry.parse(self._fs.read(self._entry(self._log(task), seq)))
            except (FileNotFoundError, NotADirectoryError, ValueError) as error:
                raise PromptCorrupt(f"entry {seq} is missing or damaged") from error

    def append(self, task: str, entry: Entry) -> bool:
        """Create the entry durably. False if another one has its sequence number.

        After an exception the entry may or may not be there: read the log to know. Raises PromptCorrupt, and
        writes nothing, if the entry before it is no longer the one that it follows.
        """
        folder = self._log(task)
        temporary = _temporary(folder)
        with storage_errors():
            if entry.prev is not None:
                self._check_previous(folder, entry)
            try:
                self._fs.write_file(temporary, entry.data)
                try:
                    self._fs.link(temporary, self._entry(folder, entry.seq))
                except FileExistsError:
                    # NOTE: NFS says so of a link that it made, too, if the first answer was lost on the way.
                    if self._fs.lstat(temporary).st_nlink == 1:
                        return False
                self._fs.sync_folder(folder)
            finally:
                with suppress(OSError):
                    self._fs.unlink(temporary)
        return True

    def settle(self, task: str) -> None:
        """Make durable what the log shows: whoever appended the last entry may have died or failed before that."""
        folder = self._log(task)
        temporary = _temporary(folder)
        with storage_errors():
            # NOTE: after a failed sync the kernel may take the folder for clean, and the next one would do nothing:
            # change it first. A folder, because a file would have to be synced itself.
            self._fs.mkdir(temporary)
            with suppress(OSError):
                self._fs.rmdir(temporary)
            self._fs.sync_folder(folder)

    def create(self, task: str) -> None:
        """Make the folders of a new task durably."""
        with storage_errors():
            for folder in (self._task(task), self._versions(task), self._log(task)):
                self._fs.make_folder(folder)
            # NOTE: also those that were there: whoever made them may have died before this.
            self._fs.sync_folder(self._task(task))
            self._fs.sync_folder(self._root)
            self._fs.sync_name(self._root)

    def upload(self, task: str, files: Mapping[str, bytes]) -> Upload:
        """Nothing is written yet."""
        return Upload(self._fs, self._versions(task), files)

    def read_file(self, task: str, number: int, name: str) -> bytes | None:
        """A file of a version as it is on disk, unchecked; None if there is none.

        The whole file is read: one that is truncated under a memory map would kill the process.
        """
        with storage_errors():
            try:
                return self._fs.read(self._versions(task) / str(number) / name)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def remove_version(self, task: str, number: int) -> None:
        """Remove the files of a version that the log says is deleted, as far as that succeeds."""
        self._remove(self._versions(task) / str(number), f"the files of {task}:{number}")

    def numbers(self, task: str) -> frozenset[int]:
        """Of the folders that may be versions, whatever the log says."""
        with storage_errors():
            try:
                names = self._fs.folders(self._versions(task))
            except (FileNotFoundError, NotADirectoryError):
                return frozenset()
        return frozenset(int(name) for name in names if _VERSION_NAME.fullmatch(name))

    def sweep(self, task: str, doomed: Collection[int], *, now: float, grace: float = GRACE) -> int:
        """Remove what writers that died have left, as far as that succeeds; return how many files and folders.

        That is temporary ones, and the folders of the versions `doomed`, which the log must not name. Nothing that
        was changed within `grace` seconds of `now` (seconds since the epoch) is touched: it may be another process
        at work.
        """
        versions, log = self._versions(task), self._log(task)
        with storage_errors():
            try:
                found = [versions / name for name in self._fs.folders(versions) if name.startswith(_TEMPORARY)]
                found += [log / name for name in self._fs.names(log) if name.startswith(_TEMPORARY)]
            except (FileNotFoundError, NotADirectoryError):
                return 0
        found += [versions / str(number) for number in sorted(doomed)]
        before = now - grace
        return sum(self._remove(path, f"a leftover of {task}: {path.name}", unless_after=before) for path in found)

    def _remove(self, path: Path, what: str, *, unless_after: float = math.inf) -> bool:
        try:
            removed = self._fs.remove(path, unless_after=unless_after)
        except FileNotFoundError:
            return False  # another process was faster
        except OSError as error:
            logger.warning("%s could not be removed: %s", what, error.strerror)
            return False
        if removed:
            logger.info("removed %s", what)
        return removed

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

    def _check_previous(self, folder: Path, entry: Entry) -> None:
        # Its end was lost, or a backup was put back, while we ran: one more entry would spoil the whole log.
        try:
            found = sha256(self._fs.read(self._entry(folder, entry.seq - 1)))
        except FileNotFoundError:
            found = None
        if found != entry.prev:
            raise PromptCorrupt(f"entry {entry.seq - 1} was changed or lost")

    def _last_seq(self, folder: Path) -> int:
        try:
            names = self._fs.names(folder)
        except (FileNotFoundError, NotADirectoryError):
            return 0
        return max((int(name[:-5]) for name in names if _ENTRY_NAME.fullmatch(name)), default=0)
