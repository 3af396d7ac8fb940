"""Which Host headers and which origins are answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.api.hosts import allowed_hosts
from app.config import Settings
from tests.access_harness import Clock
from tests.api_harness import Harness
from tests.test_access_limits import meter
from tests.test_api_errors import check


@pytest.mark.parametrize(
    ("settings", "host", "status"),
    [
        ({}, "localhost", 200),
        ({}, "LocalHost:8000", 200),
        ({}, "127.0.0.1:8000", 200),
        ({}, "[::1]", 200),
        ({}, "[::1]:8000", 200),
        ({}, "evil.example", 400),
        ({}, "evil.example:8000", 400),
        ({}, "localhost.evil.example", 400),
        ({}, "127.0.0.1.evil.example", 400),
        ({}, "[::1].evil.example", 400),
        ({}, "localhost@evil.example", 400),
        ({}, "localhost:80@evil.example", 400),
        ({}, "evil.example/localhost", 400),
        ({}, "", 400),
        ({"host": "127.0.0.2"}, "127.0.0.2:80", 200),
        ({"host": "0.0.0.0"}, "anything.example", 200),
        ({"allowed_hosts": "a.example,*.b.example"}, "A.example:1", 200),
        ({"allowed_hosts": "a.example,*.b.example"}, "x.b.example", 200),
        ({"allowed_hosts": "a.example,*.b.example"}, "xb.example", 400),
        ({"allowed_hosts": "a.example,*.b.example"}, "localhost", 400),
        ({"allowed_hosts": "*"}, "anything.example", 200),
    ],
)
def test_hosts(tmp_path: Path, settings: dict[str, str], host: str, status: int) -> None:
    harness = Harness.create(tmp_path, **{"allowed_hosts": (), **settings})
    with harness.client() as client:
        reply = client.get("/version", headers={"Host": host})
        assert reply.status_code == status
        if status == 400:
            assert reply.headers["content-type"] == "application/problem+json" and "x-request-id" in reply.headers
            assert reply.json()["error"]["code"] == "invalid_host" and "evil" not in reply.text
            assert client.post("/v1/generate", json={"input": "x"}, headers={"Host": host}).status_code == 400
            assert not harness.engine.calls


def test_defaults() -> None:
    assert allowed_hosts(Settings(host="127.0.0.1")) == ("localhost", "127.0.0.1", "[::1]", "127.0.0.1")
    assert allowed_hosts(Settings(host="0.0.0.0")) == ("*",)


PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-request-timeout,x-request-id,x-api-key,if-match",
}


def test_no_origins_by_default(tmp_path: Path) -> None:
    with Harness.create(tmp_path).client() as client:
        reply = client.get("/version", headers={"Origin": "https://a.example"})
        assert not [name for name in reply.headers if name.startswith("access-control")]
        assert client.options("/v1/generate", headers={"Origin": "https://a.example", **PREFLIGHT}).status_code == 405


@pytest.mark.parametrize("origins", ["https://a.example", "*"])
def test_origins(tmp_path: Path, origins: str) -> None:
    with Harness.create(tmp_path, cors_origins=origins, api_key="sk-0123456789abcdef").client() as client:
        headers = {"Origin": "https://a.example"}
        preflight = client.options("/v1/generate", headers=headers | PREFLIGHT)
        assert (
            preflight.status_code == 200
            and "authorization" in preflight.headers["access-control-allow-headers"].lower()
        )
        for reply in (preflight, client.get("/info", headers=headers), client.get("/version", headers=headers)):
            assert reply.headers["access-control-allow-origin"] == origins
            assert "access-control-allow-credentials" not in reply.headers
        other = client.get("/version", headers={"Origin": "https://b.example"})
        assert other.headers.get("access-control-allow-origin") == (None if origins != "*" else "*")


@pytest.mark.parametrize(
    "wrong",
    [
        {"Origin": "https://evil.example"},
        {"Access-Control-Request-Method": "TRACE"},
        {"Access-Control-Request-Headers": "x-evil"},
    ],
)
def test_a_refused_preflight_has_the_one_error_body(tmp_path: Path, wrong: dict[str, str]) -> None:
    with Harness.create(tmp_path, cors_origins="https://a.example").client() as client:
        headers = {"Origin": "https://a.example", **PREFLIGHT, **wrong}
        reply = client.options("/v1/generate", headers=headers)
        check(reply, 400)
        assert "evil" not in reply.text and "origin" in reply.headers["vary"].lower()


def test_a_page_sees_every_header_of_the_limits(tmp_path: Path) -> None:
    headers = meter(Clock(), requests_per_minute=1, tokens_per_minute=1, tokens_per_day=1, max_parallel=1).headers()
    with Harness.create(tmp_path, cors_origins="*").client() as client:
        exposed = client.get("/version", headers={"Origin": "https://a.example"}).headers
        assert headers and headers.keys() <= set(exposed["access-control-expose-headers"].split(", "))
