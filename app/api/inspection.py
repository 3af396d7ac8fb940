"""GET /v1/tasks/{task}/versions/{version}/inspect: what a version's virtual tokens look like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any

import anyio.to_thread
import torch
from fastapi import APIRouter, Query

from app import inspection
from app.access import Caller
from app.api.access import CallerDep
from app.api.deps import State, StateDep
from app.api.registry import VersionDep
from app.api.registry_schemas import InspectReply
from app.errors import SoftpromptError
from app.registry import DEFAULT_ALIAS, Registry, Version
from app.soft_prompt import SoftPrompt

MAX_COMPARED = 1_000  # other tasks' prompts that are read
MAX_SIMILAR = 10

router = APIRouter(prefix="/v1/tasks", tags=["registry"])


@router.get("/{task}/versions/{version}/inspect", response_model=InspectReply, response_model_exclude_unset=True)
async def inspect_version(
    version: VersionDep,
    state: StateDep,
    caller: CallerDep,
    neighbors: Annotated[int, Query(ge=1, le=50, description="Near vocabulary tokens of each virtual token")] = 5,
) -> Any:
    """What the virtual tokens are near to and how long they are, and which other tasks' prompts are like this one."""
    return await anyio.to_thread.run_sync(_inspect, state, caller, version, neighbors)


def _inspect(state: State, caller: Caller, version: Version, neighbors: int) -> dict[str, Any]:
    table: Any = state.base.model.get_input_embeddings()
    embedding: torch.Tensor = table.weight
    pin = state.registry.pin(version.reference)
    try:
        return {
            "task": version.task,
            "version": version.number,
            "digest": version.digest,
            "kind": pin.prompt.kind,
            "num_virtual_tokens": pin.prompt.num_virtual_tokens,
            "embedding_norm": inspection.median_norm(embedding),
            "virtual_tokens": inspection.virtual_tokens(
                pin.prompt,
                embedding,
                lambda token_id: str(state.base.tokenizer.decode([token_id])),
                neighbors=neighbors,
            ),
            "similar": inspection.similar(pin.prompt, _others(state.registry, caller, version.task), limit=MAX_SIMILAR),
        }
    finally:
        pin.release()


def _others(registry: Registry, caller: Caller, but: str) -> Iterator[tuple[str, SoftPrompt]]:
    """The prompts that other tasks' names stand for, of up to MAX_COMPARED tasks; what cannot be read is left out."""
    for task in registry.tasks()[:MAX_COMPARED]:
        if task.name == but or DEFAULT_ALIAS not in task.aliases or not caller.sees(task.name):
            continue
        with suppress(SoftpromptError):
            pin = registry.pin(task.name)
            pin.release()
            yield pin.version.reference, pin.prompt
