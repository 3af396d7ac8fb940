"""Power loss at every call of the store: each state that the disk may be left in is tried (tests/power_loss.py)."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import SoftpromptError
from app.registry import Registry
from tests.power_loss import Died, Disk, Tree, write
from tests.registry_steps import STEPS, State, describe, leftovers, open_registry, recover, retry

LIFE = STEPS[:-1]  # the sweep has its own part in `killed_and_retried`
DELETING = [step.name for step in LIFE].index("delete-version")
COLLECTING = [step.name for step in LIFE].index("collect")  # what follows is on another task, among many more states
ROOT = "srv/data/prompts"  # the folders above it are missing, too


def states_of(folder: Path) -> list[State]:
    registry = open_registry(folder / "reference")
    states: list[State] = [{}]
    for step in LIFE:
        step.run(registry)
        states.append(describe(registry))
    return states


def life(top: Path, lazy: tuple[str, ...] = (), *, calls: bool = False) -> Iterator[tuple[Tree, int, Disk]]:
    """What the power may leave after each step, with how many were acknowledged by then.

    With `calls` also what it may leave before each call.
    """
    top.mkdir(parents=True)
    disk = Disk(top, lazy)
    found: dict[Tree, None] = {}
    if calls:
        disk.on_call = lambda: found.update(dict.fromkeys(disk.root.possible()))
    registry = open_registry(top / ROOT, disk)
    for done, step in enumerate(LIFE):
        step.run(registry)
        yield from ((tree, done, disk) for tree in found)
        found.clear()
        yield from ((tree, done + 1, disk) for tree in disk.root.possible())


def killed_and_retried(
    top: Path, position: int, lazy: tuple[str, ...] = (), *, sweep: bool = False
) -> Iterator[tuple[Tree, int, Disk]]:
    """A process dies at each call of a step, another one retries it and is acknowledged, then the power goes."""
    step = LIFE[position]
    for at in itertools.count(1):
        folder = top / str(at)
        folder.mkdir(parents=True)
        disk = Disk(folder, lazy)
        registry = None
        if position:
            registry = open_registry(folder / ROOT, disk)
        for earlier in LIFE[:position]:
            earlier.run(registry)  # type: ignore[arg-type]
        before = describe(registry) if registry else {}
        disk.die(at)
        try:
            step.run(registry or open_registry(folder / ROOT, disk))
        except Died:
            died = True
        else:
            died = False
        disk.revive()
        other = open_registry(folder / ROOT, disk)
        if sweep:
            other.sweep(grace=-1e9)
        # What cannot be done twice and looks done already was acknowledged by nobody.
        done = retry(step, other, before)
        yield from ((tree, position + done, disk) for tree in disk.root.possible())
        shutil.rmtree(folder)
        if not died:
            return


def check(tree: Tree, acknowledged: int, states: list[State], folder: Path) -> Registry:
    """Acknowledged steps are there, the next one is whole or absent, and nothing is torn."""
    shutil.rmtree(folder, ignore_errors=True)
    write(tree, folder)
    registry = recover(folder / ROOT)
    assert describe(registry) in states[acknowledged : acknowledged + 2]
    return registry


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.long)], ids=["some", "all"])
def test_power_loss_at_every_call(memory_path: Path, every: int) -> None:
    """Life goes on after one state in `every`; of what deleting leaves, which is many, one in `every` is tried."""
    states = states_of(memory_path)
    tried = 0
    for number, (tree, acknowledged, _) in enumerate(life(memory_path / "life", calls=True)):
        if acknowledged > DELETING and number % every:
            continue
        registry = check(tree, acknowledged, states, memory_path / "lost")
        tried += 1
        if number % every:
            continue
        if acknowledged < len(LIFE):
            retry(LIFE[acknowledged], registry, states[acknowledged])
            assert describe(registry) == states[acknowledged + 1]
        registry.sweep(grace=-1e9)
        assert leftovers(memory_path / "lost" / ROOT) == []
        assert describe(recover(memory_path / "lost" / ROOT)) == describe(registry)
    assert tried > 300
    sys.stdout.write(f"{tried} states\n")


@pytest.mark.parametrize("sweep", [False, True], ids=["", "swept"])
@pytest.mark.parametrize(
    "position",
    [
        pytest.param(number, id=step.name, marks=[pytest.mark.long] if number > COLLECTING else [])
        for number, step in enumerate(LIFE)
    ],
)
def test_power_loss_after_a_retry(memory_path: Path, position: int, sweep: bool) -> None:
    """What another process left half-way is not acknowledged before it is durable."""
    states = states_of(memory_path)
    tried = set()
    for tree, acknowledged, _ in killed_and_retried(memory_path / "killed", position, sweep=sweep):
        if tree not in tried:
            tried.add(tree)
            check(tree, acknowledged, states, memory_path / "lost")
    sys.stdout.write(f"{len(tried)} states\n")


def test_without_any_one_of_the_syncs_something_is_lost(memory_path: Path) -> None:
    """The model sees each of them: take one away, and some state breaks the promise."""
    states = states_of(memory_path)

    def scenarios(name: str, lazy: tuple[str, ...]) -> Iterator[tuple[Tree, int, Disk]]:
        yield from killed_and_retried(memory_path / name / "killed", 0, lazy)
        yield from life(memory_path / name / "life", lazy)

    sites: dict[str, None] = {}
    for _, _, disk in scenarios("none", ()):
        sites.update(dict.fromkeys(disk.syncs))
    missed = []
    for number, site in enumerate(sites):
        for tree, acknowledged, _ in scenarios(str(number), (site,)):
            try:
                check(tree, acknowledged, states, memory_path / "lost")
            except (AssertionError, SoftpromptError):
                break
        else:
            missed.append(site)
    assert not missed
    assert len(sites) == 11, sites
