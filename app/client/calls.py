"""What each method of the clients sends and how it reads the reply. A method's signature and words are those here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar, Unpack

import httpx

from app.client.call import Call, Steps, etag_of, given, path, reading
from app.client.errors import DigestMismatch, InvalidReply, NotFound, shown
from app.client.folder import MANIFEST, PARTS, check_empty, read_folder, write_folder
from app.client.results import (
    AuditEntry,
    Change,
    Classification,
    Deleted,
    Generation,
    Info,
    Inspection,
    Model,
    Page,
    Published,
    Readiness,
    Task,
    Text,
    Tokens,
    Version,
)

T = TypeVar("T")
Reference = str | Sequence[str] | None  # several are an ensemble; None is the bare base model
PAGE = 200


class GenerateOptions(TypedDict, total=False):
    """The fields of /v1/generate beside `task` and `input`; what is left out is the version's default."""

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[str, float] | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    seed: int | None
    n: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    response_format: Mapping[str, Any] | None
    cache_salt: str | None
    user: str | None
    raw: bool | None


def generate(
    task: Reference, input: str | Sequence[str], *, deadline: float | None = None, **options: Unpack[GenerateOptions]
) -> Call[Generation]:
    """Text behind a task's soft prompt, whole. `deadline`: seconds after which the server gives up, with 504."""
    return Call(
        "POST",
        "/v1/generate",
        reading(Generation),
        headers=_deadline(deadline),
        json=given(task=task, input=input, **options),
    )


def stream(
    task: Reference, input: str | Sequence[str], *, deadline: float | None = None, **options: Unpack[GenerateOptions]
) -> Call[Any]:
    """The same in pieces as they are made: a context manager that gives a stream of events."""
    call = generate(task, input, deadline=deadline, **options)
    return replace(call, json={**call.json, "stream": True}, read=_no_stream)


def classify(
    task: Reference,
    input: str | Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    user: str | None = None,
    cache_salt: str | None = None,
    deadline: float | None = None,
) -> Call[Classification]:
    """The likeliest label of each input and the probabilities of all; labels are the version's by default."""
    body = given(task=task, input=input, labels=labels, user=user, cache_salt=cache_salt)
    return Call("POST", "/v1/classify", reading(Classification), headers=_deadline(deadline), json=body)


def tokenize(text: str, *, add_special_tokens: bool = True, with_texts: bool = False) -> Call[Tokens]:
    """Token ids of the base model."""
    body = {"prompt": text, "add_special_tokens": add_special_tokens, "return_token_strs": with_texts}
    return Call("POST", "/tokenize", reading(Tokens), json=body)


def detokenize(tokens: Sequence[int]) -> Call[str]:
    """The text of token ids."""
    read = reading(Text)
    return Call("POST", "/detokenize", lambda response: read(response).prompt, json={"tokens": list(tokens)})


def models() -> Call[list[Model]]:
    """The base model and every task that the key may see."""
    read = reading(Page[Model])
    return Call("GET", "/v1/models", lambda response: read(response).data)


def model(reference: str) -> Call[Model]:
    """What a reference, or the base model's name, stands for now."""
    return Call("GET", path("v1", "models", reference), reading(Model))


@dataclass(frozen=True)
class Listing(Generic[T]):
    """A list that is read page by page, and as far as it is asked for."""

    first: Call[Page[T]]
    name: Callable[[T], str | int]  # of an entry, for what comes after it

    def after(self, page: Page[T]) -> Call[Page[T]] | None:
        if not (page.has_more and page.data):
            return None
        return replace(self.first, params={**self.first.params, "after": self.name(page.data[-1])})


def tasks(*, tag: str | None = None, page: int = PAGE) -> Listing[Task]:
    """Tasks by name; with `tag` (`key` or `key=value`), those of which a version has it."""
    params = {"tag": tag, "limit": page}
    return Listing(Call("GET", "/v1/tasks", reading(Page[Task]), params), lambda found: found.task)


def task(name: str) -> Call[Task]:
    """A task's versions and aliases."""
    return Call("GET", path("v1", "tasks", name), reading(Task))


def versions(task: str, *, tag: str | None = None, deleted: bool = False, page: int = PAGE) -> Listing[Version]:
    """A task's versions by number, or with `deleted` those that can be restored."""
    params = {"tag": tag, "deleted": deleted or None, "limit": page}
    first = Call("GET", path("v1", "tasks", task, "versions"), reading(Page[Version]), params)
    return Listing(first, lambda found: found.version)


def version(reference: str) -> Steps[Version]:
    """What `task`, `task:7`, `task@alias` or `task@sha256:...` stands for now, with its manifest.

    Raises NotFound for the base model, too.
    """
    found = yield from model(reference)
    if found.task is None or found.version is None:
        raise NotFound(f"{reference} is the base model and has no versions")
    return (yield from Call("GET", _version_path(found.task, found.version), reading(Version)))


def push(task: str, folder: Path, *, alias: str | None = "latest", manifest: Path | None = None) -> Call[Published]:
    """Upload what PEFT's save_pretrained wrote, and manifest.json where there is one; moves `alias` to it.

    The same files again give the version that they are already, and move the alias to it again. Raises OSError.
    """
    read = reading(Published)

    def published(response: httpx.Response) -> Published:
        return read(response).model_copy(update={"created": response.status_code == 201})

    files = read_folder(folder, manifest)
    return Call(
        "POST",
        path("v1", "tasks", task, "versions"),
        published,
        {"alias": alias or ""},
        files=files,
        repeatable=False,  # somebody may have moved the alias on
    )


def pull(reference: str, folder: Path) -> Steps[Version]:
    """Write a version as the PEFT folder that it came from, whole or not at all. The folder is new or empty.

    Raises DigestMismatch, OSError.
    """
    check_empty(folder)
    found = yield from version(reference)
    files = {}
    for name in PARTS.values():
        files[name] = yield from file(found.task, found.version, name)
    if json.loads(files[MANIFEST]).get("digest") != found.digest:
        raise DigestMismatch(f"{MANIFEST} is that of another version than {found.reference}")
    write_folder(folder, files)
    return found


def file(task: str, version: int, name: str) -> Call[bytes]:
    """A file of a version, held against its ETag, which is its sha256. Raises DigestMismatch."""

    def read(response: httpx.Response) -> bytes:
        found = f"sha256:{hashlib.sha256(response.content).hexdigest()}"
        if etag_of(response) != f'"{found}"':
            raise DigestMismatch(f"{name} came as {found}, which is not its ETag")
        return response.content

    return Call("GET", path("v1", "tasks", task, "versions", version, "files", name), read)


def delete_version(task: str, version: int) -> Call[Deleted]:
    """Delete a version that no alias names; it can be restored for a while."""
    return Call("DELETE", _version_path(task, version), reading(Deleted), repeatable=False)


def delete_task(task: str) -> Call[Deleted]:
    """Delete a task's versions, and the task."""
    return Call("DELETE", path("v1", "tasks", task), reading(Deleted), repeatable=False)


def restore(task: str, version: int) -> Call[Version]:
    """Undo the deletion of a version. It gets no alias back."""
    return Call("POST", _version_path(task, version) + ":restore", reading(Version), repeatable=False)


def history(task: str, *, page: int = PAGE) -> Listing[Change]:
    """Who changed what, the newest first."""
    first = Call("GET", path("v1", "tasks", task, "history"), reading(Page[Change]), {"limit": page})
    return Listing(first, lambda change: change.seq)


def inspect(reference: str, *, neighbors: int = 5) -> Steps[Inspection]:
    """What the virtual tokens are near to, how long they are, and which tasks are alike."""
    found = yield from version(reference)
    where = _version_path(found.task, found.version) + "/inspect"
    return (yield from Call("GET", where, reading(Inspection), {"neighbors": neighbors}))


def audit(*, page: int = PAGE) -> Listing[AuditEntry]:
    """Who changed what and who was refused, the newest first."""
    return Listing(Call("GET", "/v1/audit", reading(Page[AuditEntry]), {"limit": page}), lambda entry: entry.id)


def info() -> Call[Info]:
    """The base model, the engine's counters and the number of tasks."""
    return Call("GET", "/info", reading(Info))


def ready() -> Call[Readiness]:
    """Its checks, if the server should get traffic. Raises Unavailable, at once, if not."""
    return Call("GET", "/readyz", reading(Readiness), {"verbose": ""}, retried=False)


def _deadline(seconds: float | None) -> dict[str, str]:
    return {} if seconds is None else {"X-Request-Timeout": f"{seconds:g}"}


def _version_path(task: str, version: int) -> str:
    return path("v1", "tasks", task, "versions", version)


def _no_stream(response: httpx.Response) -> Any:
    raise InvalidReply(f"{shown(response.url)}: a stream is opened with `with client.stream(...)`")
