"""Soft prompts in host memory: the tier between the store's files and the engine's KV cache."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from app.soft_prompt import SoftPrompt

Key = tuple[str, int, str]  # task, number, digest


class PromptCache:
    """The prompts used last, up to `max_bytes` of tensor data. Thread-safe.

    A caller keeps what it got for as long as it likes, so dropping an entry is always safe.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._prompts: OrderedDict[Key, SoftPrompt] = OrderedDict()
        self._loads: dict[Key, Future[SoftPrompt]] = {}
        self._lock = threading.Lock()

    def get(self, key: Key, load: Callable[[], SoftPrompt]) -> SoftPrompt:
        """The prompt, from memory or from `load`, which runs once however many threads wait for this key.

        The lock is not held meanwhile. What `load` raises, every waiting thread raises; the next call loads
        again.
        """
        with self._lock:
            prompt = self._prompts.get(key)
            if prompt is not None:
                self._prompts.move_to_end(key)
                return prompt
            loading = self._loads.get(key)
            if loading is None:
                mine = self._loads[key] = Future()
        if loading is not None:
            return loading.result()
        try:
            prompt = load()
        except BaseException as error:
            self._finish(key, mine, None)
            mine.set_exception(error)
            raise
        self._finish(key, mine, prompt)
        mine.set_result(prompt)
        return prompt

    def find(self, key: Key, *, use: bool = True) -> SoftPrompt | None:
        """The prompt if it is in memory, and unless `use` is false as the one used last. Waits for no load."""
        with self._lock:
            prompt = self._prompts.get(key)
            if prompt is not None and use:
                self._prompts.move_to_end(key)
            return prompt

    def forget(self, key: Key) -> None:
        """Drop the prompt; one that is being loaded is not kept either."""
        with self._lock:
            self._loads.pop(key, None)
            prompt = self._prompts.pop(key, None)
            if prompt is not None:
                self._bytes -= prompt.num_bytes

    def _finish(self, key: Key, loading: Future[SoftPrompt], prompt: SoftPrompt | None) -> None:
        with self._lock:
            if self._loads.get(key) is not loading:
                return
            del self._loads[key]
            if prompt is None:
                return
            self._prompts[key] = prompt
            self._bytes += prompt.num_bytes
            while self._bytes > self._max_bytes:
                _, evicted = self._prompts.popitem(last=False)
                self._bytes -= evicted.num_bytes
