"""Ways to spoil a whole safetensors file, and files that are something else."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache
from random import Random

from tests.prompt_drafts import pack_file


class _Bomb:
    """Unpickling it would raise: nobody may."""

    def __reduce__(self) -> tuple[type[BaseException], tuple[str]]:
        return (KeyboardInterrupt, ("it was unpickled",))


@cache
def foreign_files() -> dict[str, bytes]:
    """What people upload by mistake, and what attackers upload on purpose."""
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Bomb(), protocol=2))
        archive.writestr("../../evil", b"x")
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        for name, kind, target in (
            ("../evil", tarfile.REGTYPE, ""),
            ("/abs", tarfile.REGTYPE, ""),
            ("link", tarfile.SYMTYPE, "/etc"),
            ("hard", tarfile.LNKTYPE, "/etc/passwd"),
            ("dev", tarfile.CHRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    found = {f"pickle {protocol}": pickle.dumps(_Bomb(), protocol=protocol) for protocol in range(6)}
    return found | {
        "zip": zipped.getvalue(),
        "tar": tarred.getvalue(),
        "gzip": gzip.compress(zipped.getvalue(), mtime=0),
        "gzip bomb": gzip.compress(bytes(1 << 20), mtime=0),
        "bzip2": b"BZh91AY&SY" + bytes(50),
        "xz": b"\xfd7zXZ\x00" + bytes(50),
        "zstandard": b"\x28\xb5\x2f\xfd" + bytes(50),
        "gguf": b"GGUF\x03\x00\x00\x00" + bytes(16),
        "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(90),
        "numpy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}" + bytes(90),
        "html": b"<!doctype html><title>Not found</title>",
        "xml": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 640\n",
        "json": b'{"peft_type": "PROMPT_TUNING"}',
        "yaml": b"!!python/object/apply:os.system ['true']\n",
        "elf": b"\x7fELF\x02\x01\x01" + bytes(60),
        "zeros": bytes(300),
        "ones": b"\xff" * 300,
        "empty": b"",
    }


def _length(rng: Random, file: bytes) -> bytes:
    """Another length in front."""
    true = int.from_bytes(file[:8], "little")
    other = rng.choice((0, 1, 2, true - 1, true + 1, true - 8, true + 8, len(file) - 8, len(file) - 7, len(file)))
    if rng.random() < 0.5:
        other = rng.choice((0, 1, -1)) + (1 << rng.randrange(64))
    if rng.random() < 0.1:
        other = rng.choice((100_000_000, 100_000_001, 65_536, 65_537, int.from_bytes(file[:8], "big"), 2**64 - 1))
    return (other % 2**64).to_bytes(8, "little") + file[8:]


def _truncate(rng: Random, file: bytes) -> bytes:
    return file[: rng.choice((rng.randrange(9), rng.randrange(len(file) or 1), max(len(file) - rng.randint(1, 8), 0)))]


def _flip(rng: Random, file: bytes) -> bytes:
    changed = bytearray(file)
    for _ in range(rng.randint(1, 4)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _header_byte(rng: Random, file: bytes) -> bytes:
    """Any byte for one of the header's, where flips in the data would mostly only make another number."""
    changed = bytearray(file)
    length = int.from_bytes(file[:8], "little")
    if 0 < length <= len(file) - 8:
        changed[8 + rng.randrange(length)] = rng.randrange(256)
    return bytes(changed)


def _tail(rng: Random, file: bytes) -> bytes:
    tails = (
        b"\x00",
        b"\n",
        bytes(8),
        b"PK\x05\x06" + bytes(18),
        foreign_files()["zip"],
        foreign_files()["pickle 4"],
        file,
    )
    return file + rng.choice(tails)


def _front(rng: Random, file: bytes) -> bytes:
    return rng.choice((b"\x00", b"\n", b"\xef\xbb\xbf", bytes(8), foreign_files()["zip"], b"#!/bin/sh\n")) + file


def _foreign(rng: Random, file: bytes) -> bytes:  # noqa: ARG001
    found = foreign_files()
    return found[rng.choice(tuple(found))]


def _foreign_header(rng: Random, file: bytes) -> bytes:
    """Something else where the JSON belongs, under a true length."""
    length = int.from_bytes(file[:8], "little")
    found = foreign_files()
    return pack_file(found[rng.choice(tuple(found))], file[8 + length :])


def _large(rng: Random, file: bytes) -> bytes:
    """More bytes than the test's limit for a file."""
    return file + bytes(rng.choice((100_000, 300_000)))


def _noise(rng: Random, file: bytes) -> bytes:  # noqa: ARG001
    noise = rng.randbytes(rng.randint(0, 300))
    return noise if rng.random() < 0.5 else pack_file(b"{" + noise + b"}", b"")


BYTES: dict[str, Callable[[Random, bytes], bytes]] = {
    "length": _length,
    "truncate": _truncate,
    "flip": _flip,
    "header byte": _header_byte,
    "tail": _tail,
    "front": _front,
    "foreign": _foreign,
    "foreign header": _foreign_header,
    "large": _large,
    "noise": _noise,
}
