"""The states of all tasks in memory, as one immutable snapshot that readers take without a lock.

The store's logs are the truth. Every write catches up with its task's log, decides, and appends; when another
process was faster, it decides again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from app.errors import PromptCorrupt, ServerError
from app.registry.log import Change, Entry
from app.registry.reference import not_found
from app.registry.store import Store
from app.registry.task import Task, TaskState, Version

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Snapshot:
    states: Mapping[str, TaskState]
    problems: Mapping[str, str]  # task -> why its log cannot be read; without a state it is unavailable


class Index:
    """All tasks of a store. Thread-safe."""

    def __init__(self, store: Store, *, on_gone: Callable[[Version], None]) -> None:
        """Read every log. `on_gone` is told of each version that was live before and no longer is."""
        self._store = store
        self._on_gone = on_gone
        self._writing = threading.Lock()  # of this process; between processes the log decides
        self._snapshot = _Snapshot({}, {})
        self.num_swaps = 0  # times an alias changed from one target to another
        self.refresh()

    def tasks(self) -> list[Task]:
        """Tasks that have a version, by name."""
        states = self._snapshot.states
        return [states[name].task for name in sorted(states) if states[name].task.versions]

    def task(self, name: str) -> Task:
        """Raises ReferenceNotFound, and PromptCorrupt if the task's log is damaged."""
        task = self.state(name).task
        if not task.versions:
            raise not_found()
        return task

    def state(self, name: str) -> TaskState:
        """The task with what is deleted, whether it has versions or not. Raises what `task` raises."""
        snapshot = self._snapshot
        state = snapshot.states.get(name)
        if state is None and name in snapshot.problems:
            raise PromptCorrupt(f"this task is unavailable: {snapshot.problems[name]}")
        if state is None:
            raise not_found()
        return state

    def states(self) -> list[TaskState]:
        """All of them, by name."""
        return [state for _, state in sorted(self._snapshot.states.items())]

    def problems(self) -> Mapping[str, str]:
        """Task -> what the last refresh found wrong with its log."""
        return self._snapshot.problems

    def catch_up(self, task: str) -> TaskState:
        """The task as its log stands now, which is not behind any acknowledged write of any process."""
        with self._writing:
            return self._catch_up(task)

    def commit(self, task: str, decide: Callable[[TaskState], Change | None], actor: str) -> TaskState:
        """Append what `decide` makes of the task's state (None: nothing) and return the state after it.

        `decide` is called again whenever another process appended first; what it raises ends the call.
        """
        with self._writing:
            while True:
                state = self._catch_up(task)
                change = decide(state)
                if change is None:
                    self._store.settle(task)
                    return state
                entry = Entry.after(state.head, change, actor)
                # Before it is written: an entry that does not fold would make the whole task unavailable.
                after = state.fold([entry])
                if self._store.append(task, entry):
                    self._adopt(after)
                    return after

    def refresh(self) -> None:
        """Catch up with every task. Costs one failing open(2) a task when there is nothing new.

        A log that is damaged, or that cannot be read, keeps the state known before, so that what was served is served
        on; without one the task is unavailable. It is logged once, and whoever writes to the task finds out. Raises
        NotReady if the store cannot be listed.
        """
        with self._writing:
            old = self._snapshot
            states, problems = dict(old.states), {}
            names = self._store.tasks()
            # Another registry is mounted there, or none: that looks like an empty folder.
            missing = dict.fromkeys(states.keys() - set(names), "its folder is gone")
            for name in names:
                try:
                    state = self._read(name, states.get(name))
                except ServerError as error:
                    problems[name] = error.message
                    if old.problems.get(name) != error.message:
                        logger.error("the log of the task %s cannot be used: %s", name, error.message)
                else:
                    if state.head.seq:
                        states[name] = state
            for name in missing.keys() - old.problems.keys():
                logger.error("the task %s is served from memory: %s", name, missing[name])
            problems |= missing
            if states != old.states or problems != old.problems:
                self._swap(_Snapshot(states, problems))

    def _catch_up(self, task: str) -> TaskState:
        known = self._snapshot.states.get(task)
        state = self._read(task, known)
        # NOTE: a name without a log must not be remembered, or requests could fill the memory with names.
        if state is not known and state.head.seq:
            self._adopt(state)
        return state

    def _read(self, task: str, known: TaskState | None) -> TaskState:
        state = known or TaskState.empty(task)
        entries = self._store.read_log(task, state.head.seq)
        return state.fold(entries) if entries else state

    def _adopt(self, state: TaskState) -> None:
        name, old = state.task.name, self._snapshot
        problems = {task: problem for task, problem in old.problems.items() if task != name}
        self._swap(_Snapshot({**old.states, name: state}, problems))

    def _swap(self, new: _Snapshot) -> None:
        old, self._snapshot = self._snapshot, new
        for name, before in old.states.items():
            after = new.states.get(name)
            if after is before:
                continue
            for alias in before.task.aliases.values():
                moved = after and after.task.aliases.get(alias.name)
                self.num_swaps += bool(moved and moved.target != alias.target)
            for number, version in before.task.versions.items():
                if after is None or number not in after.task.versions:
                    self._on_gone(version)
