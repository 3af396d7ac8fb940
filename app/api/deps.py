"""What routes share: the parts of the server, as one typed value in the request's state."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

from fastapi import Depends, Request

from app.access import Access
from app.api.concurrency import Room, Threads
from app.api.door import Door
from app.api.logprobs import TokenTexts
from app.api.metrics import Metrics
from app.api.places import Places
from app.api.request_stats import RequestStats
from app.base_model import BaseModel
from app.config import Settings
from app.constraint import ConstraintCompiler
from app.engine import Engine
from app.engine.in_flight import InFlight
from app.inspection import Means
from app.jobs import FileStore, JobStore, Supervisor
from app.registry import Registry

MAX_SILENCE = 5.0  # seconds an engine may go without progress and still count as alive
MAX_WAITING_SCHEMAS = 16  # one is compiled at a time, which may take a second or two
MAX_UPLOADS = 8  # at once; each may hold its file in memory twice
MAX_WAITING_INSPECTIONS = 8  # one is made at a time, which may take some seconds
MAX_WAITING_SCRAPES = 4
STORE_THREADS = 8  # writes of one process wait for each other anyway
LOAD_THREADS = 32  # several requests may wait for the same prompt


@dataclass
class Readiness:
    """Whether the server should get traffic."""

    engine: Engine
    draining: bool = field(default=False, init=False)

    def checks(self) -> dict[str, str]:
        """Check -> "ok", or what is wrong."""
        stats = self.engine.stats()
        engine = "ok" if stats.ready else "down"
        if stats.seconds_since_progress >= MAX_SILENCE:
            engine = f"no progress for {stats.seconds_since_progress:.0f} seconds"
        return {"server": "draining" if self.draining else "ok", "engine": engine}

    def is_ready(self) -> bool:
        return all(found == "ok" for found in self.checks().values())


@dataclass(frozen=True)
class State:
    """Everything a route works with; the lifespan puts it into every request's state."""

    settings: Settings
    engine: Engine
    registry: Registry
    base: BaseModel
    readiness: Readiness
    constraints: ConstraintCompiler
    access: Access
    files: FileStore
    jobs: JobStore
    training: Supervisor
    metrics: Metrics
    started_at: int  # Unix time
    compiling: Room = field(default_factory=lambda: Room(MAX_WAITING_SCHEMAS, "JSON schemas"), init=False)
    uploads: Places = field(default_factory=lambda: Places(MAX_UPLOADS, "uploads"), init=False)
    scraping: Room = field(default_factory=lambda: Room(MAX_WAITING_SCRAPES, "scrapes"), init=False)
    inspecting: Room = field(default_factory=lambda: Room(MAX_WAITING_INSPECTIONS, "inspections"), init=False)
    # NOTE: not the threads that tokenise: a prompt that is in memory must need none that a disk holds up.
    storing: Threads = field(default_factory=lambda: Threads(STORE_THREADS), init=False)
    loading: Threads = field(default_factory=lambda: Threads(LOAD_THREADS), init=False)
    means: Means = field(default_factory=Means, init=False)

    @cached_property
    def door(self) -> Door:
        return Door(self.engine)

    @cached_property
    def max_rows(self) -> int:
        """Of one request: with more there would be no room in an idle engine either, however often it is asked."""
        return InFlight(self.settings.max_num_seqs + self.settings.max_waiting).max_alone

    @cached_property
    def token_texts(self) -> TokenTexts:
        return TokenTexts(self.base.tokenizer)


def get_state(request: Request) -> State:
    state: State = request.state.server
    return state


def get_stats(request: Request) -> RequestStats:
    stats: RequestStats = request.state.stats
    return stats


async def _state(request: Request) -> State:
    # A plain function would be run in a thread.
    return get_state(request)


StateDep = Annotated[State, Depends(_state)]
