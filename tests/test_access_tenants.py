"""Cached text is shared within a tenant and never beyond it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from app.access import Caller, Database, Key, KeyStore, Limits
from app.config import Settings
from app.engine.local import LocalEngine
from app.main import create_app
from app.registry import Registry, Store
from tests.access_harness import KeyedHarness, bearer
from tests.tiny import tiny_base

BASE = tiny_base("llama")
TEXT = "the same long text, again and again, until it fills a block or two of the cache"


def caller(tenant: str) -> Caller:
    return Caller(Key("key_1", "n", "sk-abcd", "", frozenset(["generate"]), None, tenant, Limits(), 0))


names = st.text(max_size=12) | st.text(alphabet="01:a", max_size=6)


@given(names, names, names, names)
def test_the_salt_is_injective(tenant: str, salt: str, other_tenant: str, other_salt: str) -> None:
    same = (tenant, salt) == (other_tenant, other_salt)
    assert (caller(tenant).salt(salt) == caller(other_tenant).salt(other_salt)) == same


def test_salts_that_look_alike() -> None:
    pairs = [("a", "bc"), ("ab", "c"), ("abc", ""), ("", "abc"), ("1", ":a"), ("", "1:1:a"), ("1:1", "a"), ("a", "0:")]
    assert len({caller(tenant).salt(salt) for tenant, salt in pairs}) == len(pairs)
    assert Caller().salt(None) == caller("").salt("") == "0:"


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/classify"])
def test_both_routes_pass_it_on(tmp_path: Path, path: str) -> None:
    harness = KeyedHarness.keyed(tmp_path / "prompts")
    headers = harness.key(tenant="acme")
    body = {"input": "x", "cache_salt": "mine"} | ({"labels": ["a", "b"]} if "classify" in path else {})
    with harness.client() as client:
        assert client.post(path, json=body, headers=headers).status_code == 200
    assert {call.salt for call in harness.engine.calls} == {"4:acmemine"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tenants") / "prompts"


@pytest.fixture(scope="module")
def secrets(root: Path) -> dict[str, str]:
    database = Database.of(Settings(registry=root))
    database.prepare()
    tenants = {"ab": "ab", "ab, again": "ab", "a": "a", "alone": None, "alone too": None}
    return {
        name: KeyStore(database).create(name, scopes=["generate"], tenant=tenant)[1] for name, tenant in tenants.items()
    }


@pytest.fixture(scope="module")
def client(root: Path, secrets: dict[str, str]) -> Iterator[TestClient]:  # noqa: ARG001
    engine = LocalEngine(BASE.model, BASE.info, max_num_seqs=4, kv_cache_tokens=4096)
    engine.start()
    settings = Settings(registry=root, allowed_hosts=("*",))
    with TestClient(create_app(settings, engine, Registry(Store(root), BASE.info), BASE)) as client:
        yield client


def test_no_tenant_finds_anothers_text_in_the_cache(client: TestClient, secrets: dict[str, str]) -> None:
    def cached(name: str, salt: str | None) -> int:
        body = {"input": TEXT, "max_tokens": 2, "cache_salt": salt}
        reply = client.post("/v1/generate", json=body, headers=bearer(secrets[name]))
        assert reply.status_code == 200, reply.text
        found: int = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    tenants = {"ab": "ab", "ab, again": "ab"}
    seen: set[tuple[str, str | None]] = set()
    for name, salt in itertools.product(secrets, (None, "c", "bc")):
        group = tenants.get(name, name), salt
        assert (cached(name, salt) > 0) == (group in seen), group
        assert cached(name, salt) > 0
        seen.add(group)
