"""A lock that processes share by inheriting it: the kernel gives it up when the last of them is gone."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class Lease:
    """An exclusive flock(2) on a file of its own.

    It belongs to the open file, not to the process. A worker that inherits the descriptor holds the lease with the
    server that started it, so a server that dies leaves none free while its worker may still write.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def take(cls, path: Path, *, wait: bool = False) -> Lease | None:
        """None if another one holds it. Raises OSError where the file cannot be made."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def fileno(self) -> int:
        assert self._descriptor is not None
        return self._descriptor

    def release(self) -> None:
        """Close this process's descriptor; does nothing the second time."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
