"""Hold deploy/ to the tools of those who read it: promtool, systemd-analyze, and the schemas of Kubernetes and compose.

promtool is in Debian's package `prometheus`, systemd-analyze in `systemd`; linters that pip can install go into a
virtual environment of their own. Exits 1 if a check fails or cannot be made.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
DEPLOY = REPO / "deploy"
TOOLS = REPO / ".venv" / "deploy-tools"
PACKAGES = ("check-jsonschema==0.39.0", "kubernetes-validate==1.37.0", "yamllint==1.38.0")
YAMLLINT = (
    "{extends: default, rules: {line-length: {max: 130}, document-start: disable, braces: disable, "
    "comments: {min-spaces-from-content: 1}}}"
)
MAX_EXPOSURE = 20  # tenths, of systemd-analyze security

failed: list[str] = []


def check(name: str, *command: str | Path, text: str | None = None) -> None:
    """Run a tool; what it says is shown only where it fails."""
    if shutil.which(command[0]) is None:
        failed.append(name)
        print(f"NOT RUN  {name}: {command[0]} is not installed")
        return
    done = subprocess.run(command, input=text, cwd=DEPLOY, capture_output=True, text=True)
    print(f"{'ok' if done.returncode == 0 else 'FAILED':8} {name}")
    if done.returncode != 0:
        failed.append(name)
        print(done.stdout + done.stderr)


def install_tools() -> None:
    made = TOOLS / "installed"  # written last: an install that was cut off is made again
    if not made.exists() or made.read_text(encoding="utf-8") != "\n".join(PACKAGES):
        subprocess.run([sys.executable, "-m", "venv", "--clear", TOOLS], check=True)
        subprocess.run([TOOLS / "bin" / "pip", "install", "--quiet", *PACKAGES], check=True)
        made.write_text("\n".join(PACKAGES), encoding="utf-8")


def dashboard_rules() -> str:
    """Every expression of the dashboard as a recording rule, so that promtool parses it."""
    text = (DEPLOY / "grafana/dashboards/softprompt.json").read_text(encoding="utf-8")
    panels = json.loads(text)["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    filled = [re.sub(r"\$\w+", ".*", expression.replace("$__rate_interval", "5m")) for expression in expressions]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(filled)]
    return json.dumps({"groups": [{"name": "dashboard", "rules": rules}]})  # which is YAML too


def scrape() -> str:
    """/metrics of a real application after a few requests."""
    sys.path.insert(0, str(REPO))
    from tests.api_harness import Harness

    with tempfile.TemporaryDirectory() as folder:
        harness = Harness.create(Path(folder) / "prompts", metrics_compat="none")
        harness.publish("mood")
        with harness.client() as client:
            client.post("/v1/generate", json={"task": "mood", "input": "x"})
            client.post("/v1/tasks/mood/versions", content=b"x")
            return client.get("/metrics").text


def main() -> None:
    install_tools()
    check("yaml", TOOLS / "bin/yamllint", "--strict", "-d", YAMLLINT, ".")
    check("compose", TOOLS / "bin/check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml")
    check("kubernetes", TOOLS / "bin/kubernetes-validate", "--strict", "kubernetes/softprompt.yaml")
    check("prometheus.yml", "promtool", "check", "config", "--syntax-only", "prometheus/prometheus.yml")
    check("alert rules", "promtool", "check", "rules", "prometheus/rules.yml")
    check("alert rules fire", "promtool", "test", "rules", "prometheus/rules_test.yml")
    check("metrics", "promtool", "check", "metrics", text=scrape())
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "dashboard.yml"
        rules.write_text(dashboard_rules(), encoding="utf-8")
        check("dashboard's expressions", "promtool", "check", "rules", rules)
        unit = Path(folder) / "softprompt.service"
        # The program need not be installed here.
        text = (DEPLOY / "systemd/softprompt.service").read_text(encoding="utf-8")
        unit.write_text(re.sub(r"(?m)^ExecStart=.*$", "ExecStart=/bin/true", text), encoding="utf-8")
        check("systemd unit", "systemd-analyze", "verify", "--man=no", unit)
        threshold = f"--threshold={MAX_EXPOSURE}"
        check("systemd hardening", "systemd-analyze", "security", "--offline=true", threshold, unit)
    if failed:
        sys.exit(f"deploy_check: {', '.join(failed)}")


if __name__ == "__main__":
    main()
