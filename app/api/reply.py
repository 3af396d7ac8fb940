"""What the replies of generation and classification have in common."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import anyio.to_thread

from app.api.lease import Lease
from app.api.schemas import PromptTokensDetails, Usage
from app.registry import Version
from app.soft_prompt import BaseInfo


async def encode(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of each text, in a thread: a long text takes a tokenizer longer than an event loop can spare."""

    def run() -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    return await anyio.to_thread.run_sync(run)


def identity(prefix: str, base: BaseInfo, version: Version | None) -> dict[str, Any]:
    """The first members of a reply: its id, and what made it (nulls for the bare base model)."""
    digests = [base.fingerprint, *([version.digest] if version else [])]
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "task": version and version.task,
        "version": version and version.number,
        "digest": version and version.digest,
        "system_fingerprint": "_".join(["fp", *(digest.removeprefix("sha256:")[:12] for digest in digests)]),
    }


def prompt_headers(version: Version | None) -> dict[str, str]:
    if version is None:
        return {}
    return {"X-Prompt-Version": version.reference, "X-Prompt-Digest": version.digest}


def usage(lease: Lease, prompts: Sequence[Sequence[int]], num_generated: int) -> Usage:
    num_text = sum(map(len, prompts))
    return Usage(
        prompt_tokens=num_text,
        completion_tokens=num_generated,
        total_tokens=num_text + num_generated,
        prompt_tokens_details=PromptTokensDetails(
            soft_prompt_tokens=len(prompts) * lease.num_virtual_tokens, cached_tokens=0
        ),
    )
