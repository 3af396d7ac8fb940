"""Malformed prompt files by the million: valid ones of every type, spoilt on purpose. The same for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from app.manifest import ManifestInput
from app.soft_prompt import BaseInfo
from tests.checkpoints import BASE
from tests.prompt_drafts import Draft, pack_file, pack_json, valid_draft
from tests.spoilt_bytes import BYTES
from tests.spoilt_configs import CONFIGS
from tests.spoilt_drafts import HEADERS, VALUES
from tests.spoilt_text import TEXTS

DRAFTS: dict[str, Callable[[Random, Draft], None]] = {**HEADERS, **VALUES, **CONFIGS}
KINDS = (
    *DRAFTS,
    *(f"header text: {name}" for name in TEXTS),
    *(f"config text: {name}" for name in TEXTS),
    *BYTES,
)
_MANIFESTS = {task_id: ManifestInput(task_id=task_id) for task_id in (0, 1, 2, 3, 2**31, 2**63)}


@dataclass(frozen=True)
class Case:
    """One upload, and what was done to it."""

    kinds: tuple[str, ...]
    config: bytes
    tensors: bytes
    manifest: ManifestInput


def case(seed: int, index: int, base: BaseInfo = BASE) -> Case:
    """Number `index` of the files of `seed` for a base model; some hundredths are left whole."""
    rng = Random(f"{seed}/{index}")
    draft = valid_draft(rng, base)
    count = rng.choices((0, 1, 2, 3), (4, 70, 20, 6))[0]
    # In turn, so that rare outcomes are reached in every run; those beyond the first at random.
    kinds = tuple([KINDS[index % len(KINDS)], *rng.choices(KINDS, k=2)][:count])
    for kind in kinds:
        if kind in DRAFTS:
            DRAFTS[kind](rng, draft)
    config, header = pack_json(draft.config), pack_json(draft.header)
    for kind in kinds:
        part, found, name = kind.partition(" text: ")
        if found and part == "header":
            header = TEXTS[name](rng, header)
        elif found:
            config = TEXTS[name](rng, config)
    tensors = pack_file(header, draft.data)
    for kind in kinds:
        if kind in BYTES:
            tensors = BYTES[kind](rng, tensors)
    return Case(kinds, config, tensors, _MANIFESTS[draft.task_id])
