"""The work that every system does: the same soft prompts, the same texts, the same lengths, from seeds.

Needs numpy alone, because it runs in every peer's environment. `prepare` runs in the project's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
# One answer a request; the log-probabilities of all labels behind it; the same by a generation a label.
Work = Literal["generate", "score", "prefills"]

PROMPT_NOISE = 0.1  # of the table's own deviation: a trained prompt starts at real tokens and moves a little
LABEL_TOKENS = 6  # of the longest label
EXAMPLES = Path(__file__).parent.parent / "examples" / "data"


@dataclass(frozen=True)
class Spec:
    """One run: `requests` requests of which `rows` are in flight at any time, task after task in turn."""

    rows: int
    requests: int = 0  # 0: as many as rows, all at once
    virtual: int = 20
    text: int = 32
    new: int = 64
    tasks: int = 8
    room: int = 0  # new tokens of the longest run to come, for a system that sets memory aside: a warm-up makes fewer
    work: Work = "generate"
    labels: int = 77  # of an input, where `work` is about labels
    prompt_seed: int = 0  # another seed makes other soft prompts, which no cache knows
    text_seed: int = 0  # another one in every run, so that no cache knows the texts

    @property
    def num_requests(self) -> int:
        return self.requests or self.rows

    @property
    def capacity(self) -> int:
        """New tokens that an answer must have room for."""
        return max(self.new, self.room)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


@dataclass(frozen=True)
class Request:
    task: int
    token_ids: list[int]


class Workload:
    """Reads what `prepare` wrote; the table stays on the disk until a row of it is needed."""

    def __init__(self, folder: Path) -> None:
        self.table: Floats = np.load(folder / "table.npy", mmap_mode="r")
        self._pool = np.load(folder / "text_ids.npy")
        self._scale = PROMPT_NOISE * float(self.table[:1000].std())

    def requests(self, spec: Spec) -> list[Request]:
        """Stretches of real text, from places that the seed picks."""
        random = np.random.default_rng([spec.text_seed, 1])
        starts = random.integers(0, len(self._pool) - spec.text, spec.num_requests)
        return [Request(i % spec.tasks, self._pool[s : s + spec.text].tolist()) for i, s in enumerate(starts)]

    def labels(self, spec: Spec) -> list[list[int]]:
        """Continuations of 1 to 6 tokens of real text, the same for every run."""
        random = np.random.default_rng([spec.labels, 3])
        starts = random.integers(0, len(self._pool) - LABEL_TOKENS, spec.labels)
        lengths = random.integers(1, LABEL_TOKENS + 1, spec.labels)
        return [self._pool[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]

    @lru_cache(maxsize=4096)  # noqa: B019 - one object a process
    def prompt(self, spec_key: tuple[int, int], task: int) -> Floats:
        """The soft prompt of a task, [virtual, hidden]; `spec_key` is (prompt_seed, virtual)."""
        seed, virtual = spec_key
        random = np.random.default_rng([seed, task, 2])
        rows = self.table[random.integers(0, len(self.table), virtual)]
        return (rows + self._scale * random.standard_normal(rows.shape)).astype(np.float32)

    def task_prompt(self, spec: Spec, task: int) -> Floats:
        return self.prompt((spec.prompt_seed, spec.virtual), task)

    def whole(self, spec: Spec, request: Request) -> Floats:
        """Soft prompt and text as embeddings, [virtual + text, hidden]: what servers without tasks are sent."""
        return np.concatenate([self.task_prompt(spec, request.task), self.table[request.token_ids]])


def prepare(model: Path, folder: Path) -> None:
    """Write the embedding table of a transformers folder, and the ids of the example texts under its tokenizer."""
    import json

    from safetensors import safe_open
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    with safe_open(model / "model.safetensors", framework="np") as weights:
        np.save(folder / "table.npy", weights.get_tensor("model.embed_tokens.weight").astype(np.float32))
    lines = [line for path in sorted(EXAMPLES.glob("*/train.jsonl")) for line in path.read_text("utf-8").splitlines()]
    text = "\n".join(json.loads(line)["input"] for line in lines)
    ids = AutoTokenizer.from_pretrained(model)(text, verbose=False)["input_ids"]
    np.save(folder / "text_ids.npy", np.array(ids, dtype=np.int64))
