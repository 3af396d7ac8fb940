"""deploy/: what it names exists, in /metrics, among the routes, settings and files. make deploy-check has tools."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.routing import APIRoute, iter_route_contexts

from app.config import Settings, variables
from tests.api_harness import Harness
from tests.scrape import Scrape

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
DOCKERFILE = (DEPLOY.parent / "Dockerfile").read_text()
YAML = sorted([*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")])
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/softprompt.json").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
MANIFESTS = {item["kind"]: item for item in yaml.safe_load_all((DEPLOY / "kubernetes/softprompt.yaml").read_text())}
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
UNIT = (DEPLOY / "systemd/softprompt.service").read_text()


def dashboard_expressions() -> list[str]:
    targets = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    return [target["expr"] for target in targets]


def expressions() -> list[str]:
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    queries = [item["query"]["query"] for item in DASHBOARD["templating"]["list"] if item["type"] == "query"]
    return dashboard_expressions() + alerts + queries


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    yield Harness.create(tmp_path_factory.mktemp("deploy") / "prompts")


@pytest.fixture(scope="module")
def found(harness: Harness) -> Scrape:
    harness.publish("mood")
    with harness.client() as client:
        client.post("/v1/generate", json={"task": "mood", "input": "x"})
        client.post("/v1/tasks/mood/versions", content=b"x")
        return Scrape.by(client)


def test_every_metric_that_is_asked_for_is_there(found: Scrape) -> None:
    asked = {name for text in expressions() for name in re.findall(r"\b(?:softprompt|process|vllm)_\w+", text)}
    assert len(asked) > 20 and asked <= found.names | {"softprompt_ready"}, asked - found.names


def test_every_label_that_is_asked_for_is_there(found: Scrape) -> None:
    """On the metric that is asked for it; Prometheus adds the first two to everything."""
    labels: dict[str, set[str]] = {}
    for name, own in found.samples:
        labels.setdefault(name, {"instance", "job"}).update(dict(own))
    for text in expressions():
        for name, selected in re.findall(r"\b((?:softprompt|process)_\w+)\{([^}]*)\}", text):
            assert set(re.findall(r"(\w+)[!=]?[=~]", selected)) <= labels[name], text
        grouped = {label.strip() for found in re.findall(r"by \(([^)]*)\)", text) for label in found.split(",")}
        names = re.findall(r"\b(?:softprompt|process)_\w+", text)
        for name in names:
            assert grouped <= labels[name], text


def test_what_the_dashboard_shows() -> None:
    shown = " ".join(dashboard_expressions())
    for metric in (
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "generation_tokens_total",
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "uploads_rejected_total",
        "http_requests_total",
        "engine_restarts_total",
    ):
        assert metric in shown
    assert "by (task)" in shown
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids)) and DASHBOARD["uid"] == "softprompt"
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    taken = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(taken) == len(set(taken)), "two panels overlap"


@pytest.mark.parametrize("path", YAML, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_it_is_yaml(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents and all(isinstance(document, dict) for document in documents)


def test_probes_ask_for_routes_that_there_are(harness: Harness) -> None:
    routes = iter_route_contexts(harness.app.routes)
    public = {route.path for route in routes if isinstance(route.original_route, APIRoute)} & {"/livez", "/readyz"}
    [container] = POD["containers"]
    for kind, path in (("startupProbe", "/readyz"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
        asked = container[kind]["httpGet"]
        assert asked["path"] == path in public
        assert asked["port"] == container["ports"][0]["name"]


def test_every_setting_that_is_made_is_one() -> None:
    files = [path for path in DEPLOY.rglob("*") if path.is_file()]
    named = {name for path in files for name in re.findall(r"\bSOFTPROMPT_[A-Z_]+", path.read_text())}
    # What Kubernetes would put there for a Service of this name, and what must not be there for that reason.
    assert len(named) > 5 and named <= set(variables())
    assert POD["enableServiceLinks"] is False


def test_ports_and_volumes_are_those_of_the_image() -> None:
    exposed = re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.M)
    assert exposed == [str(Settings.model_fields["port"].default)] == ["8000"]
    volumes = set(json.loads(re.findall(r"^VOLUME (.*)$", DOCKERFILE, re.M)[0]))
    user, group = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.M)[0]
    [container] = POD["containers"]
    assert [port["containerPort"] for port in container["ports"]] == [8000]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == volumes
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    assert (POD["securityContext"]["runAsUser"], POD["securityContext"]["runAsGroup"]) == (int(user), int(group))
    service = COMPOSE["services"]["softprompt"]
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert {volume.split(":")[1] for volume in service["volumes"]} == volumes
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert scraped[0]["static_configs"][0]["targets"] == ["softprompt:8000"]


def test_nothing_is_listened_on_beyond_the_loopback_address() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service["ports"]]
    assert len(ports) == 3 and all(port.startswith("127.0.0.1:") for port in ports)


def test_whoever_stops_it_waits_for_the_drain() -> None:
    [container] = POD["containers"]
    drain = {env["name"]: env.get("value") for env in container["env"]}["SOFTPROMPT_DRAIN_TIMEOUT"]
    assert POD["terminationGracePeriodSeconds"] >= float(drain) + 10
    service = COMPOSE["services"]["softprompt"]
    grace = float(service["stop_grace_period"].removesuffix("s"))
    assert grace >= float(service["environment"]["SOFTPROMPT_DRAIN_TIMEOUT"]) + 10
    [stop], [own] = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.M), re.findall(r"DRAIN_TIMEOUT=(\d+)$", UNIT, re.M)
    assert float(stop) >= float(own) + 10


def test_the_containers_may_do_little() -> None:
    [container] = POD["containers"]
    context: Any = container["securityContext"]
    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]} and POD["securityContext"]["runAsNonRoot"]
    assert POD["automountServiceAccountToken"] is False
    service = COMPOSE["services"]["softprompt"]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]


def test_secrets_are_referred_to_and_not_written_down() -> None:
    [container] = POD["containers"]
    for name in ("SOFTPROMPT_API_KEY", "SOFTPROMPT_DATABASE"):
        [env] = [env for env in container["env"] if env["name"] == name]
        assert env["valueFrom"]["secretKeyRef"]["name"] == "softprompt" and "value" not in env
    for path in DEPLOY.rglob("*"):
        assert path.is_dir() or not re.search(r"sk-[A-Za-z0-9_-]{16,}", path.read_text()), path


def test_a_budget_leaves_one_of_the_replicas() -> None:
    spec = MANIFESTS["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    for kind in ("Service", "PodDisruptionBudget"):
        selector = MANIFESTS[kind]["spec"]["selector"]
        assert selector.get("matchLabels", selector) == spec["selector"]["matchLabels"] == labels
    assert MANIFESTS["PodDisruptionBudget"]["spec"]["minAvailable"] < spec["replicas"]


def test_what_compose_mounts_is_there() -> None:
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / source).is_dir(), volume
    [rules] = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["rule_files"]
    assert (DEPLOY / "prometheus" / rules).is_file()
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/softprompt.yaml").read_text())
    targets = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert provider["providers"][0]["options"]["path"] in targets


def test_every_metric_stands_in_the_documents(found: Scrape) -> None:
    text = (DEPLOY.parent / "docs/operations.md").read_text()
    ours = {re.sub("_(bucket|sum|count)$", "", name) for name in found.names if name.startswith("softprompt_")}
    missing = [name for name in ours if f"`{name.removeprefix('softprompt_')}`" not in text]
    assert len(ours) > 20 and not missing
