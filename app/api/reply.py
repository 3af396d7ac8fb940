"""What the replies of generation and classification have in common."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import anyio.to_thread

from app.api.lease import Lease
from app.api.schemas import PromptTokensDetails, Usage
from app.errors import RequestError
from app.registry import Version
from app.soft_prompt import BaseInfo


async def encode(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of each text, in a thread: a long text takes a tokenizer longer than an event loop can spare."""

    def run() -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    return await anyio.to_thread.run_sync(run)


@contextmanager
def about_input(number: int, count: int) -> Iterator[None]:
    """Errors about one of several inputs say which, counted from 0."""
    try:
        yield
    except RequestError as error:
        if count > 1 and error.param == "input":
            error.message = f"input[{number}]: {error.message}"
        raise


def identity(prefix: str, base: BaseInfo, leases: Sequence[Lease]) -> dict[str, Any]:
    """The first members of a reply: its id, and what made it (nulls for the bare base model)."""
    versions = [lease.version for lease in leases]
    digests = [base.fingerprint, *(version.digest for version in versions if version)]
    fingerprint = "_".join(["fp", *(digest.removeprefix("sha256:")[:12] for digest in digests)])
    made_by = _member(versions[0]) if len(versions) == 1 else _member(None) | {"members": list(map(_member, versions))}
    return {"id": f"{prefix}-{uuid.uuid4().hex}", **made_by, "system_fingerprint": fingerprint}


def _member(version: Version | None) -> dict[str, Any]:
    return {
        "task": version and version.task,
        "version": version and version.number,
        "digest": version and version.digest,
    }


def prompt_headers(leases: Sequence[Lease]) -> dict[str, str]:
    """Of an ensemble, its members' in their order."""
    versions = [lease.version for lease in leases if lease.version]
    if not versions:
        return {}
    return {
        "X-Prompt-Version": ", ".join(version.reference for version in versions),
        "X-Prompt-Digest": ", ".join(version.digest for version in versions),
    }


def usage(
    work: Sequence[tuple[Lease, Sequence[Sequence[int]]]], *, num_generated: int = 0, num_cached: int = 0
) -> dict[str, Any]:
    """What was run: the texts behind each lease, each member of an ensemble for itself."""
    num_text = sum(len(text) for _, texts in work for text in texts)
    return Usage(
        prompt_tokens=num_text,
        completion_tokens=num_generated,
        total_tokens=num_text + num_generated,
        prompt_tokens_details=PromptTokensDetails(
            soft_prompt_tokens=sum(len(texts) * lease.num_virtual_tokens for lease, texts in work),
            cached_tokens=num_cached,
        ),
    ).model_dump()
