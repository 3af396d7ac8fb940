"""What follows a training: scored by the engine that serves, published through the door of uploads, an alias moved."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from app.base_model import BaseModel
from app.checkpoint import CONFIG_FILE, TENSORS_FILE, read_checkpoint
from app.engine import Engine
from app.errors import (
    EngineFailed,
    InvalidTrainingData,
    NotReady,
    NumericalError,
    Overloaded,
    PreconditionFailed,
    ReferenceNotFound,
    RequestError,
    SoftpromptError,
)
from app.jobs.gate import Decision, Verdict, judge
from app.jobs.job import Job
from app.manifest import BaseReference, Defaults, ManifestInput
from app.registry import Registry, Version
from app.registry.log import sha256
from app.soft_prompt import SoftPrompt
from app.text import Template
from app.train.data import Row, read_rows
from app.train.evaluate import BUSY_SECONDS, DEFAULT_ANSWER_TOKENS, Evaluator
from app.train.evaluation import Evaluation
from app.train.report import thinned

T = TypeVar("T")

LOAD_ATTEMPTS = 120  # a minute

MAX_CLASSIFIED, MAX_GENERATED = 500, 100  # validation rows that are scored, a seeded sample
ROWS_IN_FLIGHT = 4  # of a batch that users share
ROWS, CHECKED, OUT = "validation.jsonl", "checked.json", "out"


@dataclass(frozen=True)
class Trained:
    """What a worker left."""

    config: bytes
    tensors: bytes
    prompt: SoftPrompt
    template: Template
    labels: list[str] | None
    rows: list[Row]  # to score on
    task_id: int = 0  # of several in the file

    @property
    def tensors_digest(self) -> str:
        return sha256(self.tensors)


class Publisher:
    """Of one server; for its event loop."""

    def __init__(self, engine: Engine, registry: Registry, base: BaseModel) -> None:
        self._engine = engine
        self._registry = registry
        self._base = base
        self._threads = anyio.CapacityLimiter(2)  # its own: no request waits for a job's files

    async def publish(
        self, job: Job, work: Path, *, begin: Callable[[Decision], Awaitable[None]]
    ) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Score, then call `begin`, which may raise, publish and judge: (reference, metrics and gate, evaluation).

        `begin` keeps what was decided in the job. May be called again for what it did before: the same files give the
        same version, whose alias is not judged again. Raises SoftpromptError.
        """
        trained = await self._in_thread(partial(self._read, job, work))
        if not trained.rows:
            raise InvalidTrainingData(f"no validation row is of the task {job.task}, so its version cannot be scored")
        try:
            await self._load(trained.prompt)
            found = await self._evaluator(job, trained.labels).evaluate(trained.prompt, trained.template, trained.rows)
            summary = await self._in_thread(partial(found.summary, job.seed))
            measured = {"split": "validation", "rows": len(trained.rows), "soft_prompt": summary["scores"]}
            decision = await self._decide(job, trained, found)
        finally:
            with suppress(NotReady):
                await self._engine.unload(trained.prompt.digest)  # the version will have another one
        await begin(decision)
        version = await self._in_thread(partial(self._store, job, trained, measured))
        verdict = decision.verdict
        if verdict is not None and verdict.moved:
            verdict = await self._in_thread(partial(self._move, job, version, verdict, decision.etag))
        result = {"metrics": measured, "gate": None if verdict is None else verdict.as_dict()}
        return version.reference, result, summary | {"name": version.reference}

    async def _load(self, prompt: SoftPrompt) -> None:
        """An engine that others keep busy, or that starts again, is waited for: a whole training hangs on it."""
        for _ in range(LOAD_ATTEMPTS):
            try:
                return await self._engine.load(prompt)
            except (Overloaded, NotReady, EngineFailed):
                await asyncio.sleep(BUSY_SECONDS)
        return await self._engine.load(prompt)

    def _published(self, job: Job, trained: Trained) -> Version | None:
        """What was published before this server or another one died."""
        versions: Iterable[Version]
        try:
            versions = self._registry.task(job.task).versions.values()
        except ReferenceNotFound:
            versions = ()
        for version in versions:
            if version.manifest.lineage.get("job") == job.id and version.files[TENSORS_FILE] == trained.tensors_digest:
                return version
        return None

    def _store(self, job: Job, trained: Trained, metrics: dict[str, Any]) -> Version:
        """A new version, or the one that was published before."""
        if (published := self._published(job, trained)) is not None:
            return published
        manifest = self._manifest(job, trained, metrics)
        checkpoint = read_checkpoint(trained.config, trained.tensors, manifest, self._base.info)
        return self._registry.publish(job.task, checkpoint, alias=None, actor=job.owner).version

    async def _decide(self, job: Job, trained: Trained, found: Evaluation) -> Decision:
        if job.decided.get("tensors") == trained.tensors_digest and self._published(job, trained) is not None:
            # NOTE: the alias may have been moved by it already, and would be compared with itself.
            return Decision.of(job.decided)
        verdict, etag = await self._judge(job, trained, found)
        return Decision(tensors=trained.tensors_digest, verdict=verdict, etag=etag)

    async def _judge(self, job: Job, trained: Trained, found: Evaluation) -> tuple[Verdict | None, int | None]:
        """What shall become of the alias, if there is one, and its etag now (None: it is new)."""
        name = job.options.alias
        if not name:
            return None, None
        try:
            alias = self._registry.task(job.task).aliases.get(name)
        except ReferenceNotFound:
            alias = None
        if alias is None:
            return Verdict(alias=name, moved=True, reason="the alias is new"), None
        decided = partial(Verdict, alias=name)
        if not job.options.gate:
            return decided(moved=True, reason="the gate was turned off"), alias.etag
        if alias.target.is_split:
            return decided(moved=False, reason="the alias is a canary"), alias.etag
        current = self._registry.version(job.task, alias.version)
        if current.files[TENSORS_FILE] == trained.tensors_digest:
            return decided(moved=False, reason="the alias stands for the same content already"), alias.etag
        unscored = partial("{} cannot be scored: {}".format, current.reference)
        try:
            pin = await self._in_thread(partial(self._registry.pin, current.reference))
        except SoftpromptError as error:  # damaged, deleted since, or made for another base model
            return decided(moved=False, reason=unscored(error.message)), alias.etag
        try:
            theirs = await self._evaluate_current(current, pin.prompt, trained.rows)
        except (NumericalError, RequestError) as error:  # the rows are checked against the room that the new one leaves
            return decided(moved=False, reason=unscored(error.message)), alias.etag
        finally:
            pin.release()
        return await self._in_thread(partial(judge, name, found, theirs, seed=job.seed)), alias.etag

    async def _evaluate_current(self, version: Version, prompt: SoftPrompt, rows: list[Row]) -> Evaluation:
        """As its own manifest has it asked."""
        manifest = version.manifest
        evaluator = self._make_evaluator(manifest.labels, manifest.defaults.max_tokens, manifest.defaults.stop)
        return await evaluator.evaluate(prompt, manifest.parsed_template, rows, name=version.reference)

    def _move(self, job: Job, version: Version, verdict: Verdict, etag: int | None) -> Verdict:
        number = version.number
        try:
            self._registry.move_alias(job.task, verdict.alias, number, expected=etag, actor=job.owner)
        except PreconditionFailed:
            alias = self._registry.task(job.task).aliases.get(verdict.alias)
            if alias is None or alias.version != number or alias.target.is_split:
                return replace(verdict, moved=False, reason="the alias was moved while the job was being scored")
        return verdict

    def _read(self, job: Job, work: Path) -> Trained:
        checked = json.loads((work / CHECKED).read_bytes())
        path = work / ROWS
        rows = read_rows(path, max_bytes=path.stat().st_size)
        task = checked.get("task")
        task_id = 0 if task is None else job.report["tasks"].index(task)
        if task is not None:
            rows = [row for row in rows if row.task == task]
        most = MAX_GENERATED if checked["labels"] is None else MAX_CLASSIFIED
        if len(rows) > most:
            rows = random.Random(f"scored {job.seed}").sample(rows, most)
        config, tensors = ((work / OUT / name).read_bytes() for name in (CONFIG_FILE, TENSORS_FILE))
        prompt = read_checkpoint(config, tensors, ManifestInput(task_id=task_id), self._base.info).prompt
        return Trained(config, tensors, prompt, Template(checked["template"]), checked["labels"], rows, task_id)

    def _manifest(self, job: Job, trained: Trained, metrics: dict[str, Any]) -> ManifestInput:
        told = ("seed", "recipe", "steps", "best_step", "best_validation_loss", "stopped", "seconds", "train_rows")
        lineage = {
            "job": job.id,
            "started_from": job.model,
            "data": {
                "digest": job.report.get("data_digest"),
                "training_file": job.training_file,
                "training_file_digest": job.data.get("training_file_digest"),
                "validation_file": job.validation_file,
                "validation_file_digest": job.data.get("validation_file_digest"),
            },
            **{name: job.report.get(name) for name in (*told, "validation_rows", "warnings", "precision")},
            **{name: job.report[name] for name in ("tasks", "trials") if job.report.get(name)},
            "curve": thinned(job.report.get("curve", [])),
        }
        return ManifestInput(
            base=BaseReference(name=self._base.info.name, fingerprint=self._base.info.fingerprint),
            template=trained.template.text,
            labels=trained.labels,
            task_id=trained.task_id,
            defaults=Defaults(max_tokens=job.options.max_tokens, stop=job.options.stop or None),
            metrics=metrics,
            lineage=lineage,
            description=job.options.description,
        )

    def _evaluator(self, job: Job, labels: list[str] | None) -> Evaluator:
        return self._make_evaluator(labels, job.options.max_tokens, job.options.stop)

    def _make_evaluator(self, labels: list[str] | None, max_tokens: int | None, stop: list[str] | None) -> Evaluator:
        return Evaluator(
            engine=self._engine,
            tokenizer=self._base.tokenizer,
            eos_token_ids=self._base.eos_token_ids,
            labels=labels,
            max_tokens=max_tokens or DEFAULT_ANSWER_TOKENS,
            stop=stop or (),
            rows_in_flight=ROWS_IN_FLIGHT,
        )

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._threads)
