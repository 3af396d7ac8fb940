"""Keys over HTTP: every kind of wrong one looks the same, and names outside a key's patterns do not exist."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.access import Limits, known_keys
from app.access.key import Key, hash_secret, new_secret
from tests.access_harness import KeyedHarness, bearer
from tests.api_harness import files

API_KEY = "sk-the-one-of-the-settings"


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> KeyedHarness:
    harness = KeyedHarness.keyed(tmp_path_factory.mktemp("keys") / "prompts", api_key=API_KEY)
    harness.publish("support-de")
    harness.publish("support-en", 0.25)
    harness.publish("secret", 0.125, labels=["a", "b"])
    return harness


@pytest.fixture(scope="module")
def client(harness: KeyedHarness) -> Iterator[TestClient]:
    with harness.client() as client:
        yield client


def body(reply: Any) -> dict[str, Any]:
    """Without the id of the request."""
    found: dict[str, Any] = reply.json()
    found.pop("instance")
    return found


def jwt(**header: str) -> str:
    parts = [header, {"sub": "admin", "aud": "other", "scope": "admin"}]
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts) + "."


def test_every_wrong_key_gets_the_same_reply(harness: KeyedHarness, client: TestClient) -> None:
    good = harness.key("admin")
    secret = good["Authorization"].split()[1]
    revoked, expired = harness.key("admin"), harness.key("admin", expires_in=60)
    assert client.get("/info", headers=expired).status_code == 200
    harness.store.revoke(harness.key_id(revoked))
    harness.access.load()
    harness.clock.now += 60
    wrong: list[dict[str, str]] = [
        *({}, bearer("sk-wrong"), revoked, expired),
        *(bearer(""), bearer(" "), {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": secret}),
        *(bearer(secret[:-1]), bearer(secret + "x"), bearer(secret.upper()), bearer(hash_secret(secret))),
        *(bearer(harness.key_id(good)), bearer(f"{secret},{secret}"), bearer(f"{secret} {secret}")),
        *(
            {"Authorization": f"Basic {secret}"},
            {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"},
        ),
        *({"x-api-key": "wrong"}, {"Cookie": f"Authorization=Bearer {secret}"}, {"api-key": secret}),
        bearer("s" * 2**20),
        *(bearer(jwt(alg="none")), bearer(jwt(alg="HS256", kid="../../../dev/null")), bearer(jwt(alg="RS256"))),
        *(bearer("' OR 1=1 --"), bearer("%"), bearer("é\x7f")),
    ]
    expected = body(client.get("/v1/tasks"))
    assert expected["status"] == 401 and expected["error"]["code"] == "invalid_api_key"
    count = harness.access.num_unauthenticated
    for headers in wrong:
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        reply = client.get("/v1/tasks", headers=encoded)  # type: ignore[arg-type]
        assert (reply.status_code, reply.headers.get("www-authenticate")) == (401, "Bearer"), headers
        assert body(reply) == expected, headers
    assert harness.access.num_unauthenticated == count + len(wrong)
    two = [("Authorization", f"Bearer {secret}"), ("Authorization", "Bearer sk-other")]
    assert client.get("/v1/tasks", headers=two).status_code == 401, "which of the two is meant?"
    assert client.get(f"/v1/tasks?api_key={secret}&key={secret}&access_token={secret}").status_code == 401
    for headers in (
        *(good, {"Authorization": f"bearer {secret}"}, {"Authorization": f"BEARER  {secret}"}, {"x-api-key": secret}),
        *({"X-API-Key": secret, "Authorization": "Basic cHJveHk6cHc="}, bearer(API_KEY)),
    ):
        assert client.get("/v1/tasks", headers=headers).status_code == 200, headers


def test_strangers_leave_nothing_behind(harness: KeyedHarness, client: TestClient) -> None:
    before = len(client.get("/v1/audit?limit=1000", headers=bearer(API_KEY)).json()["data"])
    for number in range(50):
        client.delete("/v1/tasks/secret", headers=bearer(f"sk-{number}"))
    assert len(client.get("/v1/audit?limit=1000", headers=bearer(API_KEY)).json()["data"]) == before
    assert len(harness.access._meters) < 50


def test_a_secret_is_kept_nowhere(harness: KeyedHarness) -> None:
    secret = harness.key()["Authorization"].split()[1]
    assert secret.startswith("sk-") and len(secret) >= 3 + 43
    for path in (harness.settings.registry / ".softprompt").iterdir():
        assert secret.encode() not in path.read_bytes() and secret[7:].encode() not in path.read_bytes()
    assert len({new_secret() for _ in range(1000)}) == 1000


def test_names_outside_the_patterns_do_not_exist(harness: KeyedHarness, client: TestClient) -> None:
    headers = harness.key("admin", tasks=["support-*"])
    digest = harness.registry.resolve("secret").digest
    unknown = body(client.get("/v1/tasks/unknown", headers=bearer(API_KEY)))
    assert unknown["status"] == 404
    for method, path, options in [
        ("GET", "/v1/tasks/secret", {}),
        ("DELETE", "/v1/tasks/secret", {}),
        ("GET", "/v1/tasks/secret/versions", {}),
        ("POST", "/v1/tasks/secret/versions", {"files": files()}),
        ("POST", "/v1/tasks/new/versions", {"files": files()}),
        ("GET", "/v1/tasks/secret/versions/1", {}),
        ("DELETE", "/v1/tasks/secret/versions/1", {}),
        ("GET", "/v1/tasks/secret/versions/1/files/manifest.json", {}),
        ("GET", "/v1/tasks/secret/aliases/latest", {}),
        ("PUT", "/v1/tasks/secret/aliases/prod", {"json": {"version": 1}, "headers": {"If-None-Match": "*"}}),
        *(("GET", f"/v1/models/{name}", {}) for name in ("secret", "secret:1", "secret@latest", f"secret@{digest}")),
        ("GET", "/v1/models/tiny-llama", {}),
        *(
            ("POST", path, {"json": {"input": "x", **given}})
            for path in ("/v1/generate", "/v1/classify")
            for given in (
                *({}, {"task": None}, {"task": "tiny-llama"}, {"task": "secret"}, {"task": "secret:1"}),
                *({"task": f"secret@{digest}"}, {"task": ["support-de", "secret"]}, {"task": ["secret", "support-de"]}),
                {"task": "Support-de"},
            )
        ),
    ]:
        given = {**options, "headers": {**headers, **options.get("headers", {})}}
        reply = client.request(method, path, **given)
        assert body(reply) == unknown, (method, path, options)
    assert harness.registry.task("secret").versions, "nothing was deleted"
    assert harness.num_pins == 0
    for reply in (
        client.get("/v1/tasks/support-de", headers=headers),
        client.post("/v1/generate", json={"task": ["support-de", "support-en"], "input": "x"}, headers=headers),
    ):
        assert reply.status_code == 200
    listed = client.get("/v1/tasks", headers=headers).json()["data"]
    assert [task["task"] for task in listed] == ["support-de", "support-en"]
    models = client.get("/v1/models", headers=headers).json()["data"]
    assert [model["id"] for model in models] == ["support-de", "support-en"]
    assert client.get("/info", headers=headers).json()["tasks"] == 2
    assert client.get("/info", headers=bearer(API_KEY)).json()["tasks"] == 3


def test_pages_of_a_filtered_list_are_full(harness: KeyedHarness, client: TestClient) -> None:
    headers = harness.key("prompts:read", tasks=["support-*"])
    page = client.get("/v1/tasks?limit=1&after=secret", headers=headers).json()
    assert ([task["task"] for task in page["data"]], page["has_more"]) == (["support-de"], True)


def test_patterns_may_name_the_base_model(harness: KeyedHarness, client: TestClient) -> None:
    headers = harness.key("generate", tasks=["tiny-*"])
    assert client.post("/v1/generate", json={"input": "x"}, headers=headers).status_code == 200
    assert client.post("/v1/generate", json={"input": "x", "task": "tiny-llama"}, headers=headers).status_code == 200
    assert [model["id"] for model in client.get("/v1/models", headers=headers).json()["data"]] == ["tiny-llama"]


def test_only_who_may_move_aliases_publishes_to_one(harness: KeyedHarness, client: TestClient) -> None:
    writer = harness.key("prompts:write")
    both = harness.key("prompts:write", "aliases:write")
    path = "/v1/tasks/aliased/versions"
    assert client.post(f"{path}?alias=prod", files=files(), headers=writer).status_code == 403
    assert client.post(f"{path}?alias=", files=files(), headers=writer).status_code == 201
    assert client.post(path, files=files(0.75), headers=writer).status_code == 201
    assert client.post(f"{path}?alias=prod", files=files(), headers=both).status_code == 200


def test_the_registry_is_told_who_did_it(harness: KeyedHarness, client: TestClient) -> None:
    headers = harness.key("admin")
    mine = harness.key_id(headers)
    path = "/v1/tasks/told"
    client.post(f"{path}/versions", files=files(0.1), headers=headers)
    client.post(f"{path}/versions", files=files(0.2), headers=headers)
    client.put(f"{path}/aliases/prod", json={"version": 2}, headers={**headers, "If-None-Match": "*"})
    client.put(f"{path}/aliases/prod", json={"version": 2}, headers={**headers, "If-Match": "*"})
    assert client.delete(f"{path}/versions/1", headers=headers).status_code == 200
    entries = sorted((harness.settings.registry / "told" / "log").iterdir())
    assert len(entries) == 5 and {json.loads(entry.read_text())["actor"] for entry in entries} == {mine}
    client.post("/v1/tasks/gone/versions", files=files(0.1), headers=bearer(API_KEY))
    assert client.delete("/v1/tasks/gone", headers=bearer(API_KEY)).status_code == 200
    last = max((harness.settings.registry / "gone" / "log").iterdir())
    assert json.loads(last.read_text())["actor"] == "key_settings"


def test_changes_and_refusals_are_noted(harness: KeyedHarness, client: TestClient, caplog: Any) -> None:
    caplog.set_level("INFO", "app.access.audit")
    admin, reader = harness.key("admin"), harness.key("prompts:read")
    named = {"X-Request-Id": "mine-1"}
    client.post("/v1/tasks/noted/versions", files=files(), headers=admin | named)
    client.put("/v1/tasks/noted/aliases/prod", json={"version": 1}, headers={**admin, "If-None-Match": "*"})
    client.delete("/v1/tasks/noted/versions/1", headers=admin)
    client.delete("/v1/tasks/noted/versions/1", headers=reader)
    client.get("/v1/audit", headers=reader)
    client.get("/v1/tasks/noted", headers=reader)
    client.post("/v1/generate", json={"input": "x"}, headers=admin)
    page = client.get("/v1/audit?limit=5", headers=admin).json()
    assert page["object"] == "list" and page["has_more"] and len(page["data"]) == 5
    mine, theirs = harness.key_id(admin), harness.key_id(reader)
    found = [tuple(row[name] for name in ("key_id", "action", "target", "status")) for row in page["data"]]
    assert found == [
        (theirs, "list_audit", "", 403),
        (theirs, "delete_version", "noted:1", 403),
        (mine, "delete_version", "noted:1", 412),
        (mine, "put_alias", "noted@prod", 201),
        (mine, "publish_version", "noted", 201),
    ]
    assert page["data"][-1]["request_id"] == "mine-1" and abs(page["data"][0]["time"] - time.time()) < 60
    rest = client.get(f"/v1/audit?limit=1000&after={page['data'][-1]['id']}", headers=admin).json()
    assert not rest["has_more"] and all(row["id"] < page["data"][-1]["id"] for row in rest["data"])
    lines = [record.getMessage() for record in caplog.records]
    told = [json.loads(line.removeprefix("audit ")) for line in lines if line.startswith("audit ")]
    assert [entry["status"] for entry in told] == [201, 201, 412, 403, 403]
    for bad in ("limit=0", "limit=1001", "after=x", "after=-1", f"after={2**63}"):
        assert client.get(f"/v1/audit?{bad}", headers=admin).status_code == 400, bad


def test_a_target_that_is_no_text_is_noted_as_escapes(harness: KeyedHarness, client: TestClient) -> None:
    admin = harness.key("admin")
    assert client.delete("/v1/tasks/a%00%1B[31m", headers=admin).status_code == 404
    (row,) = client.get("/v1/audit?limit=1", headers=admin).json()["data"]
    assert row["target"] == r"a\x00\x1b[31m"


def test_a_key_in_words() -> None:
    key = Key("key_1", "n", "sk-abcd", "", frozenset(["generate"]), ("a*", "b"), "t", Limits(), 0, expires_at=10)
    assert key.has("generate") and not key.has("jobs")
    assert [key.sees(name) for name in ("a", "ab", "b", "ba", "A", "")] == [True, True, True, False, False, False]
    assert key.is_valid(9.9) and not key.is_valid(10)


def test_the_lookup_takes_no_longer_for_a_near_miss(harness: KeyedHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """By construction: the secret is hashed whole, once, and only hashes are compared, in constant time."""
    secret = harness.key()["Authorization"].split()[1]
    near = secret[:-1] + ("a" if secret[-1] != "a" else "b")
    known = harness.access._known
    hashed, compared = [], []

    def hash_(given: str) -> str:
        hashed.append(given)
        return hash_secret(given)

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(known_keys, "hash_secret", hash_)
    monkeypatch.setattr(known_keys.hmac, "compare_digest", compare)
    assert known.find(secret) is not None
    assert (hashed, compared) == ([secret], [(hash_secret(secret), hash_secret(secret))])
    for wrong in (near, "", "k" * 512):
        hashed.clear()
        assert known.find(wrong) is None and hashed == [wrong]
    hashed.clear()
    assert known.find("k" * 513) is None and not hashed
    assert {len(one) for pair in compared for one in pair} == {64}, "no secret is compared"


def test_the_file_is_its_owners_alone(harness: KeyedHarness) -> None:
    folder = harness.settings.registry / ".softprompt"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "access.db").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in folder.iterdir()] == ["access.db"]
    assert ".softprompt" not in [task.name for task in harness.registry.tasks()]
