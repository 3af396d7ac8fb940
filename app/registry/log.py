"""Entries of a task's log: who changed what and when.

An entry is one JSON object {seq, prev, op, payload, actor, time, digest}: `prev` is the sha256 of the
previous entry's bytes (null in the first), `digest` that of the entry's own JSON without it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.checkpoint import CONFIG_FILE, MANIFEST_FILE, TENSORS_FILE
from app.errors import InvalidRequest
from app.manifest import Manifest
from app.strict_json import parse_object

Digest = Annotated[str, StringConstraints(pattern=r"\Asha256:[0-9a-f]{64}\z")]
Number = Annotated[int, Field(ge=1)]
AliasName = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Share = Annotated[float, Field(gt=0, le=1)]
MAX_SPLIT = 16  # versions that one alias may stand for


class _Payload(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Files(_Payload):
    """sha256 of each file of a version; the field names are ours, the files' names are fixed."""

    config: Digest
    tensors: Digest
    manifest: Digest

    @classmethod
    def of(cls, files: dict[str, bytes]) -> Files:
        return cls(
            config=sha256(files[CONFIG_FILE]),
            tensors=sha256(files[TENSORS_FILE]),
            manifest=sha256(files[MANIFEST_FILE]),
        )

    def by_name(self) -> dict[str, str]:
        return {CONFIG_FILE: self.config, TENSORS_FILE: self.tensors, MANIFEST_FILE: self.manifest}


class PublishVersion(_Payload):
    """A new version; `alias` moves to it in the same entry, so that no reader sees one without the other."""

    version: Number
    files: Files
    # Repeats manifest.json: a start reads logs alone, and a damaged file takes nothing off a listing.
    manifest: Manifest
    alias: AliasName | None


class MoveAlias(_Payload):
    alias: AliasName
    version: Number


class SplitAlias(_Payload):
    """The alias stands for several versions, by weight: a canary."""

    alias: AliasName
    weights: Annotated[list[tuple[Number, Share]], Field(min_length=2, max_length=MAX_SPLIT)]  # by version


class RollBackAlias(_Payload):
    """The alias goes back to what it stood for before; `weights` says what that was, for readers of the log."""

    alias: AliasName
    weights: Annotated[list[tuple[Number, Share]], Field(min_length=1, max_length=MAX_SPLIT)]


class RemoveAlias(_Payload):
    alias: AliasName


class DeleteVersion(_Payload):
    """Nobody finds the version any more; its files stay until it is collected."""

    version: Number


class RestoreVersion(_Payload):
    """Take the deletion of a version back."""

    version: Number


class CollectVersion(_Payload):
    """The files of a deleted version go now, for good."""

    version: Number


class DeleteTask(_Payload):
    """Every version and alias of the task; its log goes on, so that numbers are never used again."""


Change = (
    PublishVersion
    | MoveAlias
    | SplitAlias
    | RollBackAlias
    | RemoveAlias
    | DeleteVersion
    | RestoreVersion
    | CollectVersion
    | DeleteTask
)
_CHANGES: dict[str, type[Change]] = {
    "publish": PublishVersion,
    "alias": MoveAlias,
    "split_alias": SplitAlias,
    "roll_back_alias": RollBackAlias,
    "remove_alias": RemoveAlias,
    "delete_version": DeleteVersion,
    "restore_version": RestoreVersion,
    "collect_version": CollectVersion,
    "delete_task": DeleteTask,
}
_OPS = {change: op for op, change in _CHANGES.items()}


@dataclass(frozen=True)
class Head:
    """The end of a log."""

    seq: int = 0
    digest: str | None = None


class _Line(_Payload):
    """An entry as it is written, without its digest."""

    seq: Number
    prev: Digest | None
    op: str
    payload: dict[str, Any]
    actor: Annotated[str, StringConstraints(max_length=200)]
    time: str  # RFC 3339, UTC; for people: order is that of `seq`


@dataclass(frozen=True)
class Entry:
    """One change of one task, with the bytes that say so."""

    seq: int
    prev: str | None
    change: Change
    actor: str
    time: str  # RFC 3339, UTC
    data: bytes

    @property
    def op(self) -> str:
        return _OPS[type(self.change)]

    @property
    def head(self) -> Head:
        return Head(self.seq, sha256(self.data))

    @classmethod
    def after(cls, head: Head, change: Change, actor: str) -> Entry:
        """The next entry. Raises InvalidRequest if it could not be read again."""
        line = {
            "seq": head.seq + 1,
            "prev": head.digest,
            "op": _OPS[type(change)],
            "payload": change.model_dump(mode="json"),
            "actor": actor,
            "time": now(),
        }
        try:
            return cls.parse(_sealed(line))
        except ValueError as error:
            raise InvalidRequest("the manifest or the actor cannot be stored as strict JSON") from error

    @classmethod
    def parse(cls, data: bytes) -> Entry:
        """Read an entry back. Raises ValueError for anything that `after` would not write."""
        fields = parse_object(data)
        fields.pop("digest", None)
        # Every byte counts, so that damage shows in the last entry too, which no other entry names yet.
        if _sealed(fields) != data:
            raise ValueError("the digest or the form differs")
        line = _Line.model_validate(fields)
        if line.op not in _CHANGES:
            raise ValueError("an operation that this release does not know")
        change = _CHANGES[line.op].model_validate_json(json.dumps(line.payload))
        return cls(line.seq, line.prev, change, line.actor, line.time, data)


def _sealed(fields: dict[str, Any]) -> bytes:
    return to_json({**fields, "digest": sha256(to_json(fields))})


def to_json(value: dict[str, Any], indent: int | None = None) -> bytes:
    """UTF-8 with a final newline. Raises InvalidRequest for what JSON cannot say: NaN, lone surrogates."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except ValueError as error:
        raise InvalidRequest("the manifest or the actor cannot be stored as JSON") from error


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
