"""The native kernel's build cache: built once, whole, private, and only where it can run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.engine.native import build
from app.engine.native.build import NativeUnavailable
from tests.api_harness import wait_until


@pytest.fixture(autouse=True)
def _small_kernel(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built is not run here, and compiling the real one takes a second."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "kernel.c").write_text('__attribute__((visibility("default"))) int softprompt_step(void) { return 0; }\n')
    monkeypatch.setattr(build, "_FOLDER", folder)
    monkeypatch.setattr(build, "SOURCES", ("kernel.c",))


def test_a_kernel_is_built_once_and_a_damaged_one_again(tmp_path: Path) -> None:
    path = build.build(tmp_path)
    written = path.stat().st_mtime_ns
    assert build.build(tmp_path) == path and path.stat().st_mtime_ns == written
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:5000] + b"\xff" + whole[5001:], b""):
        path.write_bytes(damaged)
        assert build.build(tmp_path) == path
        assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_two_processes_build_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from app.engine.native import build\n"
        f"build._FOLDER, build.SOURCES = Path({str(build._FOLDER)!r}), {build.SOURCES!r}\n"
        f"here = Path({str(tmp_path)!r}); (here / sys.argv[1]).touch()\n"
        "while not ((here / 'a').exists() and (here / 'b').exists()): time.sleep(0.001)\n"
        "build.load_kernel(here / 'kernels')\n"
    )
    folder = Path(build.__file__).parents[3]
    with subprocess.Popen([sys.executable, "-c", script, "a"], cwd=folder) as other:
        (tmp_path / "b").touch()
        wait_until(lambda: (tmp_path / "a").exists(), 60)
        build.load_kernel(tmp_path / "kernels")
        assert other.wait(timeout=120) == 0
    assert len(list((tmp_path / "kernels").iterdir())) == 1


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false", ""])
def test_without_a_compiler_it_is_unavailable(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailable):
        build.build(tmp_path / "kernels")


def test_a_compiler_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "cc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit 0\necho no such target >&2; exit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with pytest.raises(NativeUnavailable, match="no such target"):
        build.build(tmp_path / "kernels")


def test_a_prebuilt_kernel_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt = tmp_path / "prebuilt.so"
    monkeypatch.setattr(build, "_prebuilt_path", lambda: prebuilt)
    build.main()
    monkeypatch.setenv("CC", "/nowhere/cc")
    build.load_kernel(tmp_path / "kernels")
    # In another file: cutting a library short under the process that has loaded it breaks that process.
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(prebuilt.read_bytes()[:-1])
    damaged.replace(prebuilt)
    with pytest.raises(NativeUnavailable):
        build.load_kernel(tmp_path / "kernels")


def test_a_prebuilt_kernel_that_does_not_load_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt = tmp_path / "prebuilt.so"
    prebuilt.write_bytes(b"for another C library" + hashlib.sha256(b"for another C library").digest())
    monkeypatch.setattr(build, "_prebuilt_path", lambda: prebuilt)
    assert build.load_kernel(tmp_path / "kernels").softprompt_step
    assert len(list((tmp_path / "kernels").iterdir())) == 1


@pytest.mark.parametrize("mode", [0o770, 0o702])
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_can_write_is_not_run(what: str, mode: int, tmp_path: Path) -> None:
    path = build.build(tmp_path)
    (tmp_path if what == "folder" else path).chmod(mode)
    with pytest.raises(NativeUnavailable, match="can write"):
        build.load_kernel(tmp_path)
    (tmp_path if what == "folder" else path).chmod(0o700)
    build.load_kernel(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_own_is_not_run(what: str, tmp_path: Path) -> None:
    path = build.build(tmp_path)
    os.chown(tmp_path if what == "folder" else path, 4242, -1)
    with pytest.raises(NativeUnavailable, match="can write"):
        build.load_kernel(tmp_path)


def test_an_open_umask_does_no_harm(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        build.load_kernel(tmp_path / "a" / "b")
        build.load_kernel(tmp_path / "a" / "b")
    finally:
        os.umask(before)


def test_a_user_without_a_home_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(NativeUnavailable, match="home directory"):
        build.build()


@pytest.mark.parametrize(("system", "machine"), [("linux", "aarch64"), ("darwin", "x86_64"), ("win32", "AMD64")])
def test_an_image_for_another_platform_can_be_built(
    system: str, machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "_prebuilt_path", lambda: tmp_path / "prebuilt.so")
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setenv("CC", "/nowhere/cc")
    build.main()
    assert f"this is {system} on {machine}" in capsys.readouterr().out and not list(tmp_path.iterdir())
    with pytest.raises(NativeUnavailable, match=machine):
        build.load_kernel(tmp_path)


def test_a_machine_without_avx2_builds_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise NativeUnavailable("the CPU has no avx2")

    monkeypatch.setattr(build, "_require_cpu", fail)
    monkeypatch.setattr(build, "_prebuilt_path", lambda: tmp_path / "prebuilt.so")
    build.main()
    assert (tmp_path / "prebuilt.so").exists()


def test_a_cpu_without_avx2_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = Path.read_text

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        return "flags : sse2 avx" if str(self) == "/proc/cpuinfo" else original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(NativeUnavailable, match="no avx2 and no fma"):
        build.load_kernel(tmp_path)
