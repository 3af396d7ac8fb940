"""Answer the test split behind every soft prompt that a run of the study left, by the engine that serves."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

from app.base_model import BaseModel, load_base_model
from app.checkpoint import CONFIG_FILE, TENSORS_FILE, read_checkpoint
from app.config import Settings
from app.engine import Engine
from app.local_engine import local_engine
from app.manifest import ManifestInput
from app.train.evaluate import Evaluator
from benchmarks.quality.tasks import TASKS


async def answer(engine: Engine, base: BaseModel, folder: Path, data: Path, told: dict[str, object]) -> dict[str, Any]:
    """One answer for each row of the task's test split, and the log-likelihoods of its labels."""
    task = TASKS[str(told["task"])]
    splits = task.splits(data)
    config, tensors = ((folder / name).read_bytes() for name in (CONFIG_FILE, TENSORS_FILE))
    prompt = read_checkpoint(config, tensors, ManifestInput(), base.info).prompt
    await engine.load(prompt)
    evaluator = Evaluator(
        engine=engine,
        tokenizer=base.tokenizer,
        eos_token_ids=base.eos_token_ids,
        labels=splits.labels() if task.classify else None,
        max_tokens=task.max_tokens,
        stop=["\n"],
    )
    found = await evaluator.evaluate(prompt, task.template, splits.test)
    answered: dict[str, Any] = {"answers": list(found.answers)}
    if found.label_scores is not None:
        answered |= {"labels": found.labels, "label_scores": [[round(x, 4) for x in row] for row in found.label_scores]}
    return answered


def is_answered(told: dict[str, Any]) -> bool:
    return "answers" in told and ("label_scores" in told or not TASKS[told["task"]].classify)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    settings = Settings()
    base = load_base_model(settings.model, cache_dir=settings.cache_dir, device=settings.device, dtype=settings.dtype)
    engine = local_engine(settings, base)
    engine.start()
    try:
        for path in sorted(arguments.out.glob("*.json")):
            told = json.loads(path.read_text(encoding="utf-8"))
            folder = arguments.out / "prompts" / path.stem
            if is_answered(told) or not (folder / TENSORS_FILE).exists():
                continue
            began = time.monotonic()
            told |= asyncio.run(answer(engine, base, folder, arguments.data, told))
            path.with_suffix(".partial").write_text(json.dumps(told), encoding="utf-8")
            path.with_suffix(".partial").replace(path)
            print(f"{path.stem}: {time.monotonic() - began:.0f} s", flush=True)
    finally:
        engine.stop()


if __name__ == "__main__":
    main()
