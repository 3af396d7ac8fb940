"""Uploaded training files: kept as they came, each with a note of whose it is."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from app.errors import InvalidRequest, RateLimited
from app.jobs.folders import Folders
from app.jobs.names import new_id, unknown
from app.registry.durable import FileSystem

logger = logging.getLogger(__name__)

MAX_FILES = 1_000  # of one tenant
MAX_NAME = 255  # characters
RETRY_AFTER = 3600  # seconds; nobody knows when the owner deletes something
CONTENT = "content.jsonl"
_NOTE = "file.json"


@dataclass(frozen=True)
class TrainingFile:
    """What is known of an upload; `name` is the client's, for people only."""

    id: str
    created_at: int  # Unix seconds
    name: str
    bytes: int
    owner: str  # the id of a key
    tenant: str


class FileStore:
    """Thread-safe. Every call blocks; see `Folders` for what it raises."""

    def __init__(self, root: Path, *, max_bytes: int, fs: FileSystem | None = None) -> None:
        """`max_bytes` is what the files of one tenant may have together."""
        self._folders = Folders(root, "file", fs)
        self._max_bytes = max_bytes
        self._creating = threading.Lock()

    def create(self, data: bytes, *, name: str, owner: str, tenant: str) -> TrainingFile:
        """Durable on return. Raises InvalidRequest for an empty file, and RateLimited beyond the tenant's share."""
        if not data:
            raise InvalidRequest("the file is empty", param="file")
        file = TrainingFile(new_id("file"), int(time.time()), _shown(name), len(data), owner, tenant)

        def fill(draft: Path) -> None:
            self._folders.fs.write_file(draft / CONTENT, data)
            self._folders.fs.write_file(draft / _NOTE, json.dumps(asdict(file)).encode())

        with self._creating:
            theirs = [other for other in self.all() if other.tenant == tenant]
            if len(theirs) >= MAX_FILES:
                raise RateLimited(f"there may be {MAX_FILES} files: delete some", retry_after=RETRY_AFTER)
            if sum(other.bytes for other in theirs) + len(data) > self._max_bytes:
                raise RateLimited(
                    f"files may have {self._max_bytes} bytes together: delete some", retry_after=RETRY_AFTER
                )
            self._folders.create(file.id, fill)
        return file

    def all(self) -> list[TrainingFile]:
        """The newest first."""
        found = []
        for item in self._folders.ids():
            note = self._folders.read(item, _NOTE)
            if note is not None:
                try:
                    found.append(TrainingFile(**json.loads(note)))
                except (ValueError, TypeError):
                    logger.warning("the note of %s is damaged", item)
        return found

    def get(self, file_id: str) -> TrainingFile:
        """Raises ReferenceNotFound."""
        note = self._folders.read(file_id, _NOTE)
        if note is None:
            raise unknown("file")
        try:
            return TrainingFile(**json.loads(note))
        except (ValueError, TypeError):
            raise unknown("file") from None

    def read(self, file_id: str) -> bytes:
        """Raises ReferenceNotFound."""
        data = self._folders.read(file_id, CONTENT)
        if data is None:
            raise unknown("file")
        return data

    def path(self, file_id: str) -> Path:
        """Of its content."""
        return self._folders.path(file_id) / CONTENT

    def delete(self, file_id: str) -> None:
        """Jobs keep what they were given."""
        self._folders.remove(file_id)

    def sweep(self) -> None:
        self._folders.sweep()


def _shown(name: str) -> str:
    """A name that can be printed, whatever was sent."""
    kept = "".join(c if c.isprintable() else "_" for c in name)[:MAX_NAME]
    return kept or "training.jsonl"
