"""Every route against every role: nothing is reached that the table here does not allow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.testclient import TestClient

from app.access.key import SCOPES
from app.api.scopes import NEEDS, PUBLIC_PATHS
from tests.access_harness import KeyedHarness, bearer
from tests.api_harness import Harness

ALL = frozenset(SCOPES)
ANYBODY = ALL | {"nobody"}

# Written by hand, from README: not derived from the table that the server uses.
ALLOWED = {
    "GET /livez": ANYBODY,
    "GET /readyz": ANYBODY,
    "GET /health": ANYBODY,
    "GET /version": ANYBODY,
    "GET /docs": ANYBODY,
    "GET /docs/oauth2-redirect": ANYBODY,
    "GET /info": ALL,
    "GET /v1/models": ALL,
    "GET /v1/models/{reference:path}": ALL,
    "POST /v1/generate": {"generate", "admin"},
    "POST /v1/classify": {"generate", "admin"},
    "POST /v1/completions": {"generate", "admin"},
    "POST /v1/chat/completions": {"generate", "admin"},
    "POST /tokenize": {"generate", "admin"},
    "POST /detokenize": {"generate", "admin"},
    "GET /v1/tasks": {"prompts:read", "admin"},
    "GET /v1/tasks/{task}": {"prompts:read", "admin"},
    "GET /v1/tasks/{task}/versions": {"prompts:read", "admin"},
    "GET /v1/tasks/{task}/versions/{version}": {"prompts:read", "admin"},
    "GET /v1/tasks/{task}/versions/{version}/files/{name}": {"prompts:read", "admin"},
    "GET /v1/tasks/{task}/aliases/{alias}": {"prompts:read", "admin"},
    "GET /v1/tasks/{task}/versions/{version}/inspect": {"prompts:read", "admin"},
    "GET /v1/tasks/{task}/history": {"prompts:read", "admin"},
    "POST /v1/tasks/{task}/versions": {"prompts:write", "admin"},
    "POST /v1/tasks/{task}/versions/{version}:restore": {"prompts:write", "admin"},
    "DELETE /v1/tasks/{task}/versions/{version}": {"prompts:write", "admin"},
    "DELETE /v1/tasks/{task}": {"prompts:write", "admin"},
    "PUT /v1/tasks/{task}/aliases/{alias}": {"aliases:write", "admin"},
    "DELETE /v1/tasks/{task}/aliases/{alias}": {"aliases:write", "admin"},
    "POST /v1/tasks/{task}/aliases/{alias}:rollback": {"aliases:write", "admin"},
    "POST /v1/files": {"jobs", "admin"},
    "GET /v1/files": {"jobs", "admin"},
    "GET /v1/files/{file}": {"jobs", "admin"},
    "GET /v1/files/{file}/content": {"jobs", "admin"},
    "DELETE /v1/files/{file}": {"jobs", "admin"},
    "POST /v1/fine_tuning/jobs": {"jobs", "admin"},
    "GET /v1/fine_tuning/jobs": {"jobs", "admin"},
    "GET /v1/fine_tuning/jobs/{job}": {"jobs", "admin"},
    "GET /v1/fine_tuning/jobs/{job}/events": {"jobs", "admin"},
    "GET /v1/fine_tuning/jobs/{job}/checkpoints": {"jobs", "admin"},
    "GET /v1/fine_tuning/jobs/{job}/report": {"jobs", "admin"},
    "POST /v1/fine_tuning/jobs/{job}/cancel": {"jobs", "admin"},
    "POST /v1/fine_tuning/jobs/{job}/pause": {"jobs", "admin"},
    "POST /v1/fine_tuning/jobs/{job}/resume": {"jobs", "admin"},
    "GET /v1/audit": {"admin"},
    "GET /metrics": {"metrics", "admin"},
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY")


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> KeyedHarness:
    harness = KeyedHarness.keyed(tmp_path_factory.mktemp("routes") / "prompts")
    harness.publish("mine")
    return harness


@pytest.fixture(scope="module")
def roles(harness: KeyedHarness) -> dict[str, dict[str, str]]:
    return {"nobody": {}, "wrong": bearer("sk-wrong"), **{scope: harness.key(scope) for scope in SCOPES}}


@pytest.fixture(scope="module")
def client(harness: KeyedHarness, roles: dict[str, dict[str, str]]) -> Iterator[TestClient]:  # noqa: ARG001
    with harness.client() as client:
        yield client


def url(path: str) -> str:
    """One that names nothing there is, so that whatever is reached changes nothing."""
    for name in ("task", "version", "alias", "name", "reference:path", "file", "job"):
        path = path.replace(f"{{{name}}}", "7")
    return path


def test_the_table_names_every_route(harness: KeyedHarness) -> None:
    found, other = set(), set()
    for context in iter_route_contexts(harness.app.routes):
        if isinstance(context.original_route, APIRoute):
            found |= {f"{method} {context.path}" for method in context.methods or ()}
            assert context.name in NEEDS, f"{context.path}: give {context.name} a scope in app/api/scopes.py"
        else:
            other.add(context.path)
    assert found == set(ALLOWED), "a route is new or gone: say here who may call it"
    assert other == PUBLIC_PATHS, "a route without dependencies is open to everyone"


@pytest.mark.parametrize("route", ALLOWED)
def test_who_gets_in(client: TestClient, roles: dict[str, dict[str, str]], route: str) -> None:
    method, path = route.split()
    for role, headers in roles.items():
        # The body is neither read nor judged before the key is: it fits no route.
        reply = client.request(method, url(path), headers=headers, content=b"{")
        known = "nobody" if role == "wrong" else role
        if known in ALLOWED[route]:
            assert reply.status_code not in (401, 403, 405), (role, reply.text)
        elif known == "nobody":
            assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer", (role, reply.text)
        else:
            assert reply.status_code == 403 and reply.json()["error"]["code"] == "permission_denied", (role, reply.text)


@pytest.mark.parametrize("path", dict.fromkeys(route.split()[1] for route in ALLOWED))
def test_no_other_spelling_gets_further(client: TestClient, roles: dict[str, dict[str, str]], path: str) -> None:
    spellings = [url(path), url(path) + "/", "/" + url(path), url(path).replace("/", "//"), url(path).upper()]
    spellings += [url(path) + "?x=/livez", "/livez/.." + url(path), url(path) + "%2f", url(path) + ";/livez"]
    own = {route.split()[0] for route in ALLOWED if route.split()[1] == path}
    for number, method in enumerate(METHODS):
        override = {"X-HTTP-Method-Override": "GET", "X-Original-URL": "/livez", "X-Forwarded-Prefix": "/livez"}
        for place, spelling in enumerate(spellings):
            if method not in own and (number + place + len(path)) % 3:
                continue  # of the methods that the path has not, a third for each spelling
            known = f"{method} {path}"
            if ALLOWED.get(known) is ANYBODY:
                continue
            for role in ("nobody", "generate"):
                if role != "nobody" and method not in own:
                    continue  # who has no key has gone there already
                if known in ALLOWED and role in ALLOWED[known] or (role != "nobody" and "/models" in path):
                    continue
                reply = client.request(method, f"http://livez{spelling}", headers=roles[role] | override)
                assert reply.status_code in (401, 403, 404, 405), (role, method, spelling)


def test_a_host_header_does_not_choose_the_route(client: TestClient) -> None:
    for host in ("x/livez?", "x/livez#", "testserver/livez", "livez"):
        assert client.get("/v1/tasks", headers={"Host": host}).status_code == 401


def test_what_is_public_says_nothing_of_tasks(client: TestClient) -> None:
    for path in ("/livez", "/readyz?verbose", "/health", "/version", "/docs", "/openapi.json"):
        reply = client.get(path)
        assert reply.status_code == 200 and "mine" not in reply.text


@pytest.mark.parametrize("by", ["app", "router", "nested", "api_route"])
def test_a_route_without_an_entry_is_open_to_nobody(tmp_path: pytest.TempPathFactory, by: str) -> None:
    for with_keys in (False, True):
        harness = KeyedHarness.keyed(tmp_path / str(with_keys))  # type: ignore[operator]
        headers = harness.key("admin") if with_keys else {}
        reached = []

        async def added() -> dict[str, str]:
            reached.append(1)  # noqa: B023
            return {}

        router = APIRouter()
        match by:
            case "app":
                harness.app.get("/v1/added")(added)
            case "router":
                router.get("/v1/added")(added)
                harness.app.include_router(router)
            case "nested":
                inner = APIRouter()
                inner.get("/added")(added)
                router.include_router(inner, prefix="/v1")
                harness.app.include_router(router)
            case "api_route":
                harness.app.add_api_route("/v1/added", added)
        with harness.client() as client:
            assert client.get("/v1/added", headers=headers).status_code == 403
            assert client.get("/v1/added").status_code == (401 if with_keys else 403)
        assert not reached


def test_open_without_keys(tmp_path_factory: pytest.TempPathFactory) -> None:
    harness = Harness.create(tmp_path_factory.mktemp("open") / "prompts")
    with harness.client() as client:
        assert client.get("/v1/tasks").status_code == 200
        assert client.get("/v1/tasks", headers=bearer("whatever")).status_code == 200
        assert client.post("/v1/generate", json={"input": "x"}).status_code == 200
        assert client.get("/v1/audit").json() == {"object": "list", "data": [], "has_more": False}
    assert not (harness.settings.registry / ".softprompt").exists(), "no key, no database"
