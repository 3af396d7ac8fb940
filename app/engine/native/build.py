"""Compiles the kernel once and finds it again.

A library is named by a digest of all that made it, and ends in a digest of its own bytes (the loader ignores what
stands behind an ELF file), so that a damaged one is never loaded. `python -m app.engine.native.build` writes one
beside the source, for images without a compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

# The first includes the others.
SOURCES = ("kernel.c", "pool.h", "phases.h", "attention.h", "products.h", "storage.h", "vector.h", "decoder.h")
FLAGS = (
    *("-std=c11", "-D_GNU_SOURCE", "-O3", "-mavx2", "-mfma", "-mf16c", "-shared", "-fPIC", "-pthread"),
    "-fvisibility=hidden",
    # NOTE: the kernel promises the same bits for a row whatever surrounds it: which products are fused with a sum
    # must not depend on how a loop was unrolled.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
log = logging.getLogger(__name__)

_FOLDER = Path(__file__).resolve().parent
_DIGEST_SIZE = hashlib.sha256().digest_size
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT_S = 300


class NativeUnavailable(Exception):
    """This machine cannot build or run the kernel; `reason` says why. The caller has other ways to run the model."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the native decoder is not available: {reason}")
        self.reason = reason


def load_kernel(cache_dir: Path | None = None) -> ctypes.CDLL:
    """The kernel, prebuilt, from `cache_dir` or compiled now. Raises NativeUnavailable."""
    _require_cpu()
    prebuilt = _prebuilt_path()
    if _is_whole(prebuilt):
        try:
            return ctypes.CDLL(str(prebuilt))
        except OSError as error:  # made on another system, with another C library
            log.info("the prebuilt kernel cannot be loaded: %s", error)
    path = build(cache_dir)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path.name} cannot be loaded: {error}") from error


def build(cache_dir: Path | None = None) -> Path:
    """Compile into `cache_dir` (default: softprompt/native in the user's cache) unless it is there already.

    What is there is loaded as code, so nobody else may be able to write it. Raises NativeUnavailable.
    """
    folder = cache_dir or _default_cache_dir()
    compiler = find_compiler()
    path = folder / f"kernel-{_digest(_version(compiler))}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_private(folder)
        if path.exists():
            _require_private(path)
        if not _is_whole(path):
            _compile(compiler, path)
    except OSError as error:
        raise NativeUnavailable(f"{folder} cannot be used: {error}") from error
    return path


def find_compiler() -> list[str]:
    """The command in $CC, or the first compiler on the path. Raises NativeUnavailable."""
    command = shlex.split(os.environ.get("CC", ""))
    if command:
        found = shutil.which(command[0])
        if found is None:
            raise NativeUnavailable(f"there is no compiler {command[0]!r} ($CC)")
        return [found, *command[1:]]
    for name in _COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return [found]
    raise NativeUnavailable(f"there is no C compiler ({', '.join(_COMPILERS)} or $CC)")


def _require_platform() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise NativeUnavailable(f"it needs Linux on x86-64, this is {sys.platform} on {platform.machine()}")


def _require_cpu() -> None:
    _require_platform()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as error:
        raise NativeUnavailable(f"the CPU's features cannot be read: {error}") from error
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    missing = [name for name in ("avx2", "fma", "f16c") if name not in flags]
    if missing:
        raise NativeUnavailable(f"the CPU has no {' and no '.join(missing)}")


def _require_private(path: Path) -> None:
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NativeUnavailable(f"others than this user can write {path}, and what is there would be run")


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((_FOLDER / name).read_bytes())
    for part in (*FLAGS, *parts):
        digest.update(b"\0" + part.encode())
    return digest.hexdigest()[:16]


def _version(compiler: list[str]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"{compiler[0]} does not run: {error}") from error
    return shlex.join(compiler) + done.stdout


def _compile(compiler: list[str], path: Path) -> None:
    """Write `path` at once, whole: another process may be building or loading the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as scratch:
            output = Path(scratch) / path.name
            command = [*compiler, *FLAGS, str(_FOLDER / SOURCES[0]), "-o", str(output), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
            if done.returncode:
                raise NativeUnavailable(f"{compiler[0]} failed: {done.stderr.strip()[-500:]}")
            output.chmod(0o755)  # whatever the umask: nobody else writes it
            with output.open("ab") as file:
                file.write(hashlib.sha256(output.read_bytes()).digest())
                file.flush()
                os.fsync(file.fileno())
            output.replace(path)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"the kernel cannot be built in {path.parent}: {error}") from error


def _is_whole(path: Path) -> bool:
    try:
        data = path.read_bytes()
    except OSError:
        return False
    content, digest = data[:-_DIGEST_SIZE], data[-_DIGEST_SIZE:]
    return hashlib.sha256(content).digest() == digest


def _prebuilt_path() -> Path:
    return _FOLDER / f"kernel-{_digest()}.so"


def _default_cache_dir() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softprompt" / "native"
    except RuntimeError as error:
        raise NativeUnavailable(f"there is no folder for it: {error}") from error


def main() -> None:
    """Build beside the source, for any CPU of this platform; on a platform that cannot have it, only say so."""
    try:
        _require_platform()
    except NativeUnavailable as error:
        sys.stdout.write(f"{error}\n")
        return
    _compile(find_compiler(), _prebuilt_path())


if __name__ == "__main__":
    main()
