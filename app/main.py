"""The application: routers, errors and lifespan put together; and `serve`, which gives it its parts."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypedDict

import anyio.to_thread
from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline

from app import __version__, logs
from app.access import Access
from app.api import aliases, audit, classify, document, errors, generate, inspection, models, ops
from app.api import registry as registry_routes
from app.api.access import authorise
from app.api.concurrency import Threads
from app.api.cors import Cors
from app.api.deps import Readiness, State
from app.api.hosts import HostMiddleware, allowed_hosts, is_loopback
from app.api.metrics import Metrics
from app.api.observe import ObserveMiddleware
from app.api.openai import chat, completions, files, fine_tuning, tokenize
from app.api.request_id import RequestIdMiddleware
from app.api.schemas import Problem
from app.api.server import Server, bind
from app.api.settle import SettleMiddleware
from app.api.tracing import Tracing
from app.base_model import BaseModel
from app.config import Settings
from app.constraint import ConstraintCompiler
from app.engine import Engine
from app.errors import EngineFailed, InvalidSettings
from app.jobs import FileStore, JobStore, Parts, Publisher, Supervisor
from app.local_engine import load_base, local_engine
from app.registry import Registry, Store

log = logging.getLogger(__name__)

REFRESH_INTERVAL = 1.0  # seconds until a version that another process published is seen
COLLECT_INTERVAL = 600.0  # seconds
SWEEP_INTERVAL = 3600.0  # seconds between two looks for what writers that died have left

_DESCRIPTION = """One frozen base model, many soft prompts. A request names a task by a reference: `task`,
`task:7`, `task@alias` or `task@sha256:<digest>`; without one the bare base model answers."""
_PROBLEM: dict[str, Any] = {
    "description": "What is wrong (RFC 9457)",
    "content": {"application/problem+json": {"schema": Problem.model_json_schema()}},
}


class LifespanState(TypedDict):
    """What the lifespan puts into every request's state."""

    server: State


def create_app(
    settings: Settings,
    engine: Engine,
    registry: Registry,
    base: BaseModel,
    access: Access | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application over parts that are ready; its lifespan stops the engine at the end.

    `access` and `tracing` are by default what the settings name.

    `app.state.readiness` lets the server that runs it announce that it drains.
    """
    readiness = Readiness(engine)
    constraints = ConstraintCompiler(base.tokenizer, base.eos_token_ids, base.info.vocab_size)
    access = access or Access.open(settings)
    tracing = tracing or Tracing.of(settings)
    folder = settings.training_folder
    uploads = FileStore(folder / "files", max_bytes=settings.max_training_bytes)
    jobs = JobStore(folder / "jobs", max_active=settings.max_training_queue)

    def sweep_training() -> None:
        uploads.sweep()
        jobs.sweep()

    parts = Parts(settings, jobs, access, base, Publisher(engine, registry, base))
    training = Supervisor(parts, sweep=sweep_training)
    vllm = settings.metrics_compat == "vllm"
    metrics = Metrics(engine, registry, base, jobs, is_ready=readiness.is_ready, vllm=vllm)
    state = State(
        *(settings, engine, registry, base, readiness, constraints, access, uploads, jobs, training, metrics),
        started_at=int(time.time()),
    )

    def collect() -> None:
        registry.collect(retention=settings.deleted_retention)

    def sweep() -> None:
        registry.sweep(retention=settings.deleted_retention)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[LifespanState]:
        chores = [
            asyncio.create_task(_repeat(REFRESH_INTERVAL, registry.refresh, "refreshed")),
            asyncio.create_task(_repeat(COLLECT_INTERVAL, collect, "collected")),
            asyncio.create_task(_repeat(SWEEP_INTERVAL, sweep, "swept")),
            asyncio.create_task(training.run()),
        ]
        try:
            async with access.running():
                yield {"server": state}
        finally:
            for chore in chores:
                chore.cancel()
            await asyncio.gather(*chores, return_exceptions=True)
            await anyio.to_thread.run_sync(engine.stop)
            if tracing is not None:
                await anyio.to_thread.run_sync(tracing.shut_down)

    app = FastAPIOffline(
        redoc_url=None,
        title="softprompt",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        dependencies=[Depends(authorise)],
        # A redirect would be built from the Host header.
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
        # The validator badge would send the schema to another host.
        swagger_ui_parameters={"validatorUrl": None},
    )
    app.state.readiness, app.state.metrics, app.state.jobs = readiness, metrics, jobs
    # The last one is the outermost.
    app.add_middleware(SettleMiddleware)
    if settings.cors_origins:
        app.add_middleware(Cors, origins=settings.cors_origins)
    app.add_middleware(HostMiddleware, allowed=allowed_hosts(settings))
    app.add_middleware(ObserveMiddleware, counts=metrics.counts, tracing=tracing)
    app.add_middleware(RequestIdMiddleware)
    errors.install(app)
    document.install(app)
    for module in (
        generate,
        classify,
        completions,
        chat,
        tokenize,
        files,
        fine_tuning,
        models,
        registry_routes,
        aliases,
        inspection,
        audit,
        ops,
    ):
        app.include_router(module.router, responses={"4XX": _PROBLEM, "5XX": _PROBLEM})
    if tracing is not None:
        tracing.install(app, base.info.name)
    for route in app.routes:  # FastAPI makes them when they are first asked: 0.2 s that no request shall wait
        route.matches({"type": "http", "method": "GET", "path": "/", "headers": []})
    return app


def serve(settings: Settings) -> None:
    """Load everything, then answer requests until a signal says otherwise.

    Raises InvalidSettings, InvalidBaseModel, NotReady, and EngineFailed if the engine could not be kept alive.
    """
    secrets = [secret.get_secret_value() for secret in (settings.api_key, settings.database) if secret is not None]
    logs.configure(settings.log_level, settings.log_format, secrets)
    access = Access.open(settings)
    _check_exposure(settings, access)
    tracing = Tracing.of(settings)
    listener = bind(settings.host, settings.port, stall_timeout=settings.send_timeout)
    base = load_base(settings)
    registry = Registry(Store(settings.registry), base.info)
    engine = local_engine(settings, base)
    engine.start()
    app = create_app(settings, engine, registry, base, access, tracing)
    greeting = f"(base {base.info.name}, {len(registry.tasks())} tasks)"
    server = Server(
        app,
        listener,
        readiness=app.state.readiness,
        engine=engine,
        drain_timeout=settings.drain_timeout,
        receive_timeout=settings.receive_timeout,
        send_timeout=settings.send_timeout,
        greeting=greeting,
    )
    # A full collection would look at every object of every library, a quarter of a second in which nothing moves.
    gc.collect()
    gc.freeze()
    server.run()
    if engine.stats().given_up:
        raise EngineFailed("the engine died again and again; the log has the errors")


def _check_exposure(settings: Settings, access: Access) -> None:
    if not access.is_open or is_loopback(settings.host):
        return
    if not settings.insecure:
        raise InvalidSettings(
            f"host is {settings.host!r}, where others reach it, and there is no key: make one with "
            "`softprompt keys create`, set SOFTPROMPT_API_KEY, or start with --insecure"
        )
    log.warning("listening on %s: whoever reaches this address can use and change every prompt", settings.host)


async def _repeat(interval: float, chore: Callable[[], object], done: str) -> None:
    thread = Threads(1)  # its own, so that a disk that hangs holds up nothing else
    while True:
        try:
            await thread.run(chore)
        except Exception:
            log.exception("the registry could not be %s; what is in memory is served on", done)
        await asyncio.sleep(interval)


def _operation_id(route: APIRoute) -> str:
    return route.name
