"""What the clock tells a stranger: nothing about keys that exist, nothing about other tenants' texts.

Each test says by the same measure what would be seen if there were something to see. AUC: how often a time of the one
kind is longer than a time of the other (0.5: no telling).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from app.access import Database, Key, KeyStore, Limits
from app.access.key import hash_secret, new_secret
from app.access.known_keys import KnownKeys
from app.config import Settings
from app.engine.local import LocalEngine
from app.main import create_app
from app.registry import Registry, Store
from tests.access_harness import bearer
from tests.tiny import tiny_base


def auc(ones: list[float], others: list[float]) -> float:
    """The statistic of Mann and Whitney over the number of pairs; ties count half."""
    others_sorted = np.sort(others)
    below = np.searchsorted(others_sorted, ones, "left") + np.searchsorted(others_sorted, ones, "right")
    return float(below.sum() / (2 * len(ones) * len(others)))


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter_ns()
    call()
    return float(time.perf_counter_ns() - begin)


def test_auc() -> None:
    assert auc([2, 3], [0, 1]) == 1 and auc([0, 1], [2, 3]) == 0 and auc([1, 1], [1, 1]) == 0.5
    assert auc([1, 3], [2, 2]) == 0.5


@pytest.mark.parametrize("count", [20_000, pytest.param(200_000, marks=pytest.mark.long)])
def test_a_secret_that_is_nearly_right_takes_no_longer(count: int) -> None:
    rng = random.Random(18)
    secrets = [new_secret() for _ in range(50)]
    known = KnownKeys(
        Key(f"key_{i}", "n", secret[:7], hash_secret(secret), frozenset(["generate"]), None, "", Limits(), 0)
        for i, secret in enumerate(secrets)
    )

    def naive(secret: str) -> bool:
        """By its first characters first, as a table of secrets would be searched."""
        return any(all(a == b for a, b in zip(mine, secret, strict=True)) for mine in secrets[:3])

    far = [new_secret() for _ in range(count)]
    # Of many endings: one hash always falls on the same place of the table, which takes its own time.
    near = [rng.choice(secrets[:3])[:-6] + other[-6:] for other in far]
    assert not any(map(known.find, near[:100])) and known.find(secrets[0])

    def compare(find: Callable[[str], object], pairs: list[tuple[str, str]]) -> float:
        times: tuple[list[float], list[float]] = ([], [])
        for pair in pairs:
            for kind in rng.sample((0, 1), 2):
                secret = pair[kind].encode().decode()  # as of a request: made just now, wherever the other kind is too
                times[kind].append(timed(lambda secret=secret: find(secret)))  # type: ignore[misc]
        return auc(*times)

    pairs = list(zip(near, far, strict=True))
    assert compare(naive, pairs[:1_000]) > 0.6
    assert abs(compare(known.find, pairs) - 0.5) <= 0.02


@pytest.mark.long
@pytest.mark.timeout(0)
def test_the_first_token_comes_no_sooner_for_another_tenants_text(tmp_path: Path, count: int = 2_000) -> None:
    base, root, rng = tiny_base("llama"), tmp_path / "prompts", random.Random(20)
    database = Database.of(Settings(registry=root))
    database.prepare()
    mine, other = (KeyStore(database).create(name, scopes=["generate"], tenant=name)[1] for name in ("mine", "other"))
    engine = LocalEngine(base.model, base.info, max_num_seqs=4, kv_cache_tokens=16_384)
    engine.start()
    settings = Settings(registry=root, allowed_hosts=("*",))

    def new_text() -> str:
        return "".join(rng.choices("abcdefghijklmnop ", k=400))

    with TestClient(create_app(settings, engine, Registry(Store(root), base.info), base)) as client:

        def ask(secret: str, text: str) -> float:
            body = {"input": text, "max_tokens": 1}
            return timed(lambda: client.post("/v1/generate", json=body, headers=bearer(secret)).raise_for_status())

        def compare(asker: str, pairs: int) -> float:
            """New texts against such as `mine` has just sent."""
            new, sent = [], []
            for _ in range(pairs):
                text = new_text()
                ask(mine, text)
                for kind in rng.sample((0, 1), 2):
                    if kind:
                        sent.append(ask(asker, text))
                    else:
                        new.append(ask(asker, new_text()))
            return auc(new, sent)

        own, others = compare(mine, 200), compare(other, count)
        print(f"AUC {own:.3f} within a tenant, {others:.3f} beyond it")  # noqa: T201
        assert own > 0.7
        assert abs(others - 0.5) <= 0.05
