"""A real server on real sockets over a real engine and a tiny model, and what it must look like afterwards."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from app.checkpoint import Checkpoint, read_checkpoint
from app.config import Settings
from app.engine import SamplingParams
from app.engine.local import LocalEngine
from app.main import create_app
from app.manifest import ManifestInput
from app.registry import Registry, Store
from app.soft_prompt import SoftPrompt
from tests.api_harness import Harness, Listening, wait_until
from tests.tiny import tiny_base

BASE = tiny_base("llama")
NUM_VIRTUAL_TOKENS = 5


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Live:
    harness: Harness
    listening: Listening
    engine: LocalEngine

    @property
    def port(self) -> int:
        return self.listening.port

    @property
    def num_pins(self) -> int:
        return self.harness.num_pins

    def publish(self, task: str, seed: int, **manifest: Any) -> int:
        """The version's number."""
        return self.harness.registry.publish(task, content(seed, **manifest)).version.number

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """Over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with closing(connection):
            return ask(connection, method, path, body, headers)

    def assert_idle(self) -> None:
        """Nothing is left of any request: no sequence, no pin, no block but those of idle prompts, no connection."""
        engine = self.engine
        wait_until(lambda: not engine.stats().running and not engine.stats().waiting and not engine._core.has_work)
        wait_until(lambda: self.num_pins == 0)
        wait_until(lambda: self.listening.num_connections == 0)
        assert not engine._core._releases and not engine._in_flight._counts
        assert self.listening.server.lifespan.state["server"].door._num_inside == 0
        blocks = engine._blocks
        prefixes = list(blocks._prefixes.values())
        assert all(prefix.users == 0 and prefix.ready for prefix in prefixes)
        assert blocks.num_used_blocks == len({block for prefix in prefixes for block in prefix.block_table})


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """Over a connection that stays open. A body that is not bytes goes as JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
    reply = connection.getresponse()
    return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())


@contextmanager
def live(
    root: Path,
    *,
    max_num_seqs: int = 8,
    max_waiting: int = 256,
    kv_cache_tokens: int = 16_384,
    step_seconds: float = 0.0,
    host_cache_bytes: int = 2**30,
    restart_delay: float = 0.2,
    drain_timeout: float = 5.0,
    stall_timeout: float = 60.0,
    **settings: Any,
) -> Iterator[Live]:
    """`step_seconds` makes every step longer, as a larger model on another device would: it leaves the cores alone."""
    engine = LocalEngine(
        BASE.model,
        BASE.info,
        max_num_seqs=max_num_seqs,
        max_waiting=max_waiting,
        kv_cache_tokens=kv_cache_tokens,
        host_cache_bytes=host_cache_bytes,
        restart_delay=restart_delay,
    )
    engine.start()
    if step_seconds:
        run = engine._core.runner.run
        engine._core.runner.run = lambda rows: (time.sleep(step_seconds), run(rows))[1]  # type: ignore[method-assign]
    registry = Registry(Store(root), BASE.info)
    room: dict[str, Any] = {"max_num_seqs": max_num_seqs, "max_waiting": max_waiting}
    chosen = Settings(registry=root, **{"allowed_hosts": ("*",), **room, **settings})
    app = create_app(chosen, engine, registry, BASE)
    harness = Harness(chosen, engine, registry, BASE, app)  # type: ignore[arg-type]
    gc.collect()
    gc.freeze()  # as `serve` does
    try:
        with harness.listening(drain_timeout=drain_timeout, stall_timeout=stall_timeout) as listening:
            yield Live(harness, listening, engine)
    finally:
        gc.unfreeze()


def tensors(seed: int, config: dict[str, Any] | None = None) -> bytes:
    """One file with its configuration in the metadata, as an upload takes it. Another seed, another answer."""
    values = torch.randn(NUM_VIRTUAL_TOKENS, 32, generator=torch.Generator().manual_seed(seed))
    return save({"prompt_embeddings": values}, metadata={"adapter_config": json.dumps(_CONFIG | (config or {}))})


_CONFIG = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": NUM_VIRTUAL_TOKENS}


def content(seed: int, **manifest: Any) -> Checkpoint:
    return read_checkpoint(json.dumps(_CONFIG).encode(), tensors(seed), ManifestInput(**manifest), BASE.info)


async def answer_alone(engine: LocalEngine, prompt: SoftPrompt | None, text: str, params: SamplingParams) -> str:
    """What nothing else can have touched: greedy, the engine asked directly, one request at a time."""
    ids = BASE.tokenizer(text)["input_ids"]
    found = [token.id async for token in engine.generate(prompt, ids, params) if token.id is not None]
    decoded: str = BASE.tokenizer.decode(found, skip_special_tokens=True)
    return decoded


@cache
def golden(
    seeds: Sequence[int], texts: Sequence[str], max_tokens: int, *, ignore_eos: bool = False
) -> dict[str, dict[str, str]]:
    """Digest -> text -> answer."""
    engine = LocalEngine(BASE.model, BASE.info, max_num_seqs=1, kv_cache_tokens=4_096)
    engine.start()
    stop = frozenset() if ignore_eos else BASE.eos_token_ids
    params = SamplingParams(max_tokens=max_tokens, temperature=0, stop_token_ids=stop)

    async def run() -> dict[str, dict[str, str]]:
        table = {}
        for seed in seeds:
            prompt = content(seed).prompt
            table[prompt.digest] = {text: await answer_alone(engine, prompt, text, params) for text in texts}
        return table

    try:
        return asyncio.run(run())
    finally:
        engine.stop()
