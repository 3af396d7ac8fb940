"""GET /v1/tasks/{task}/versions/{version}/inspect: what a version's virtual tokens look like."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from itertools import islice
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Query
from fastapi.responses import Response

from app import inspection
from app.access import Caller
from app.api.access import CallerDep
from app.api.deps import State, StateDep
from app.api.registry import VersionDep
from app.api.registry_schemas import InspectReply
from app.errors import InvalidRequest, SoftpromptError
from app.inspection import Mean
from app.registry import DEFAULT_ALIAS, Version

MAX_NEAR = 50_000  # words in a reply
MAX_COMPARED = 1_000  # other tasks' prompts
MAX_SIMILAR = 10

router = APIRouter(prefix="/v1/tasks", tags=["registry"])


@router.get("/{task}/versions/{version}/inspect", response_model=InspectReply)
async def inspect_version(
    version: VersionDep,
    state: StateDep,
    caller: CallerDep,
    neighbors: Annotated[
        int,
        Query(ge=1, le=50, description=f"Near vocabulary tokens of each virtual token; at most {MAX_NEAR} in all"),
    ] = 5,
) -> Response:
    """What the virtual tokens are near to and how long they are, and which other tasks' prompts are like this one."""
    reply = await state.inspecting.run(partial(_inspect, state, caller, version, neighbors))
    return Response(reply, media_type="application/json")


def _inspect(state: State, caller: Caller, version: Version, neighbors: int) -> bytes:
    """The reply as `InspectReply` says: JSON already, for it may have megabytes."""
    table: Any = state.base.model.get_input_embeddings()
    embedding: torch.Tensor = table.weight
    prompt = state.registry.read_prompt(version)
    most = max(1, MAX_NEAR // prompt.num_virtual_tokens)
    if prompt.kind == "embedding" and neighbors > most:
        raise InvalidRequest(
            f"neighbors: at most {most} for the {prompt.num_virtual_tokens} virtual tokens of this version",
            param="neighbors",
        )

    @cache
    def text_of(token_id: int) -> str:
        return str(state.base.tokenizer.decode([token_id]))

    reply = {
        "task": version.task,
        "version": version.number,
        "digest": version.digest,
        "kind": prompt.kind,
        "num_virtual_tokens": prompt.num_virtual_tokens,
        "embedding_norm": inspection.median_norm(embedding),
        "virtual_tokens": inspection.virtual_tokens(prompt, embedding, text_of, neighbors=neighbors),
        "similar": inspection.similar(Mean.of(prompt), _others(state, caller, version.task), limit=MAX_SIMILAR),
    }
    return json.dumps(reply, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _others(state: State, caller: Caller, but: str) -> Iterator[tuple[str, Mean]]:
    """What other tasks' names stand for, of up to MAX_COMPARED tasks; what cannot be read is left out."""
    tasks = (
        task
        for task in state.registry.tasks()
        if task.name != but and DEFAULT_ALIAS in task.aliases and caller.sees(task.name)
    )
    for task in islice(tasks, MAX_COMPARED):
        # Of a canary the one with the largest share, as in every listing.
        version = task.versions[task.aliases[DEFAULT_ALIAS].version]
        with suppress(SoftpromptError):
            # NOTE: read past the cache, from which a thousand prompts would push out those in use.
            yield version.reference, state.means.get(version.digest, partial(state.registry.read_prompt, version))
