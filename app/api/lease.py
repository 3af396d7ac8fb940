"""Versions held for one request that makes several engine calls."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from app.access import Caller
from app.api.deps import State
from app.api.request_stats import RequestStats
from app.api.visible import check_reference
from app.engine import Constraint, Engine, Generation, SamplingParams
from app.errors import InvalidRequest
from app.registry import Pin, Version
from app.soft_prompt import SoftPrompt


class Lease:
    """One pin, or none for the bare base model, shared by engine calls; the last to end releases it."""

    def __init__(self, pin: Pin | None, leave: Callable[[], None], stats: RequestStats) -> None:
        """`leave` is called when the engine counts the request itself."""
        self._leave = leave
        self.stats = stats
        self.version: Version | None = pin.version if pin else None
        self.prompt: SoftPrompt | None = pin.prompt if pin else None
        self._pin = pin
        self._shares = 0
        self._lock = threading.Lock()

    @property
    def num_virtual_tokens(self) -> int:
        return self.prompt.num_virtual_tokens if self.prompt else 0

    def generate(
        self,
        engine: Engine,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        constraint: Constraint | None = None,
        salt: str = "",
    ) -> Generation:
        """`Engine.generate` behind this version."""
        self._leave()
        give_back = self.share()
        try:
            generation = engine.generate(
                self.prompt, token_ids, params, constraint=constraint, salt=salt, on_release=give_back
            )
            self.stats.is_admitted = True
            return generation
        except BaseException:
            give_back()
            raise

    async def score(
        self, engine: Engine, token_ids: Sequence[int], continuations: Sequence[Sequence[int]], *, salt: str = ""
    ) -> list[list[float]]:
        """`Engine.score` behind this version."""
        self._leave()
        give_back = self.share()
        self.stats.is_admitted = True
        try:
            return await engine.score(self.prompt, token_ids, continuations, salt=salt, on_release=give_back)
        except Exception:
            # The call was refused, or it failed and the engine has given back already. A cancelled one is neither:
            # the engine still holds the prompt and gives back itself.
            give_back()
            raise

    def share(self) -> Callable[[], None]:
        """Take a share. Calling the result gives it back: from any thread, and more than once does no harm."""
        given_back = threading.Lock()
        with self._lock:
            self._shares += 1

        def give_back() -> None:
            if not given_back.acquire(blocking=False):
                return
            with self._lock:
                self._shares -= 1
                last = self._shares == 0
            if last and self._pin is not None:
                self._pin.release()

        return give_back


@asynccontextmanager
async def leased(
    state: State, caller: Caller, task: str | list[str] | None, stats: RequestStats, *, user: str | None = None
) -> AsyncIterator[list[Lease]]:
    """Resolve each reference of `task` once and hold what they name while the request starts its engine calls.

    One lease, or one for each member of an ensemble; `user` decides which version of a canary. None and the base
    model's name give the bare base. Raises what `Registry.pin` and `Door.enter` raise, ReferenceNotFound also for
    what the caller may not know of, and InvalidRequest for an
    ensemble in which a version stands twice.
    """
    give_back: list[Callable[[], None]] = []
    leases: list[Lease] = []
    stats.begin(",".join(task) if isinstance(task, list) else task)
    try:
        for reference in task if isinstance(task, list) else [task]:
            check_reference(caller, reference, state.base.info.name)
            named = reference if reference != state.base.info.name else None
            version = None if named is None else state.registry.resolve(named, user=user)
            leave = state.door.enter(None if version is None else version.digest)
            give_back.append(leave)
            pin = None
            if named is not None and version is not None:
                pin = state.registry.pin_in_memory(version)
                # Only what has to be read needs a thread, and then none of those that every request needs.
                pin = pin or await state.loading.run(partial(state.registry.pin, named, user=user, drawn=version))
            leases.append(Lease(pin, leave, stats))
            stats.versions.append(leases[-1].version)
            give_back.append(leases[-1].share())
        # NOTE: not their digests, because versions of two tasks may have the same bytes.
        if len({lease.version and lease.version.reference for lease in leases}) < len(leases):
            raise InvalidRequest("task: a version stands twice in the ensemble", param="task")
        yield leases
    finally:
        for give in give_back:
            give()
