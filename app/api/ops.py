"""Whether the server lives, whether it should get traffic, and what it is."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import Response

import app
from app.api.access import CallerDep
from app.api.deps import StateDep
from app.api.metrics import CONTENT_TYPE
from app.errors import NotReady

router = APIRouter(tags=["operations"])

Verbose = Annotated[str | None, Query(description="Present: name every check")]


@router.get("/livez")
async def livez() -> dict[str, str]:
    """200 as long as the event loop turns."""
    return {"status": "alive"}


@router.get("/health", name="health")
@router.get("/readyz")
async def readyz(state: StateDep, verbose: Verbose = None) -> dict[str, Any]:
    """200 while the server should get traffic; 503 with the failing checks otherwise."""
    checks = state.readiness.checks()
    failing = [f"{name}: {found}" for name, found in checks.items() if found != "ok"]
    if failing:
        raise NotReady("; ".join(failing))
    if verbose is None:
        return {"status": "ready"}
    # A detail: what is in memory is served on, and no other server on the same folder would be better off.
    return {"status": "ready", "checks": checks | {"registry": state.registry.trouble() or "ok"}}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(state: StateDep, caller: CallerDep) -> Response:
    """Prometheus metrics. Of tasks only those are named that the key may know of."""
    text = await state.scraping.run(partial(state.metrics.text, caller.sees))
    return Response(text, media_type=CONTENT_TYPE)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": app.__version__}


@router.get("/info")
async def info(state: StateDep, caller: CallerDep) -> dict[str, Any]:
    """The base model, the engine's counters and the number of tasks."""
    base = state.base
    return {
        "version": app.__version__,
        "base": {
            "name": base.info.name,
            "fingerprint": base.info.fingerprint,
            "architecture": base.info.architecture,
            "dtype": str(base.dtype).removeprefix("torch."),
            "device": str(base.device),
            "hidden_size": base.info.hidden_size,
            "num_layers": base.info.num_layers,
            "max_model_len": base.info.max_model_len,
        },
        "engine": {"backend": state.engine.backend, **asdict(state.engine.stats())},
        "tasks": sum(caller.sees(task.name) for task in state.registry.tasks()),
    }
