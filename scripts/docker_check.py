"""Run the Dockerfile without Docker: build its stages, start its command, ask the server, stop it.

For machines without a Docker engine; needs Linux, root, `unshare` and overlayfs. This machine's root under an
overlay stands in for the base image, with this interpreter as /usr/local; every RUN, COPY, ENV, USER,
WORKDIR, VOLUME, HEALTHCHECK, ENTRYPOINT and CMD is taken from the file. The server then runs as the image's user on
a read-only root, so a write outside the volumes fails as it would under `docker run --read-only`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
# What the machine needs to reach a package index; a container would get it from its engine.
NETWORK = re.compile(r"PIP_.*|(HTTP|HTTPS|NO)_PROXY|SSL_CERT_.*", re.IGNORECASE)
START_SECONDS = 600
BAD_SETTINGS = 2  # the exit code (docs/cli.md)
STOP_SECONDS = 60


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, argument) pairs; comments dropped, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    split = (line.strip().split(None, 1) for line in joined.splitlines() if line.strip())
    return [(name.upper(), argument) for name, argument in split]


@dataclass
class Stage:
    """One FROM: a root folder and what the instructions so far have set."""

    root: Path
    env: dict[str, str]
    args: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: tuple[int, int] = (0, 0)
    volumes: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def expand(self, text: str) -> str:
        return string.Template(text).safe_substitute(self.args | self.env)

    def inside(self, path: str) -> Path:
        return self.root / os.path.join(self.workdir, path).lstrip("/")

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        uid, gid = self.user

        def enter() -> None:
            os.chroot(self.root)
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
            os.chdir(self.workdir)

        return subprocess.Popen(command, preexec_fn=enter, stdin=subprocess.DEVNULL, **options)


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def new_stage(name: str, work: Path) -> Stage:
    upper, scratch, root = (work / name / part for part in ("upper", "scratch", "root"))
    for folder in (upper, scratch, root):
        folder.mkdir(parents=True)
    mount("-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={upper},workdir={scratch}", root)
    if not Path(sys.base_prefix, "bin/python").exists():
        sys.exit(f"docker_check: {sys.base_prefix} has no bin/python to stand in for the image's Python")
    mount("--bind", sys.base_prefix, root / "usr/local")
    mount("-o", "remount,bind,ro", root / "usr/local")
    mount("-t", "proc", "proc", root / "proc")
    mount("--rbind", "/dev", root / "dev")
    for hidden in ("root", "home", "tmp", "run"):  # of this machine, not of an image
        mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", root / hidden)
    network = {key: value for key, value in os.environ.items() if NETWORK.fullmatch(key)}
    path = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    stage = Stage(root, env={"PATH": path, "HOME": "/root", **network})
    run(stage, "ldconfig")  # this interpreter's libpython moved with it
    return stage


def run(stage: Stage, script: str) -> None:
    done = stage.start(["/bin/sh", "-c", script], env=stage.args | stage.env).wait()
    if done != 0:
        sys.exit(f"docker_check: RUN {script} exited {done}")


def copy(stage: Stage, argument: str, stages: dict[str, Stage]) -> None:
    words = shlex.split(stage.expand(argument))
    flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
    *sources, target = [word for word in words if not word.startswith("--")]
    base = stages[flags["from"]].root if "from" in flags else REPO
    destination = stage.inside(target)
    owner = flags.get("chown", "0:0") if "from" not in flags or "chown" in flags else None
    for source in sources:
        origin = base / source.lstrip("/")
        into = destination / origin.name if origin.is_file() and target.endswith("/") else destination
        into.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            skip = None if "from" in flags else shutil.ignore_patterns("__pycache__")
            shutil.copytree(origin, into, symlinks=True, dirs_exist_ok=True, ignore=skip)
        else:
            shutil.copy2(origin, into)
        if owner is not None:
            subprocess.run(["chown", "-R", owner, into], check=True)


def words(argument: str) -> list[str]:
    if not argument.startswith("["):
        sys.exit(f"docker_check: not in exec form: {argument}")
    parsed: list[str] = json.loads(argument)
    return parsed


def build(text: str, build_args: dict[str, str], work: Path) -> Stage:
    """Carry out every instruction; returns the last stage."""
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for name, argument in instructions(text):
        print(f"--- {name} {argument[:100]}", flush=True)
        if name == "FROM":
            label = argument.split()[-1] if " AS " in argument.upper() else f"stage{len(stages)}"
            stage = stages[label] = new_stage(label, work)
            continue
        if stage is None:
            sys.exit(f"docker_check: {name} before FROM")
        match name:
            case "ARG":
                key, _, default = argument.partition("=")
                stage.args[key] = build_args.get(key, default.strip("\"'"))
            case "ENV":
                stage.env |= dict(word.split("=", 1) for word in shlex.split(stage.expand(argument)))
            case "WORKDIR":
                stage.workdir = os.path.join(stage.workdir, stage.expand(argument))
                stage.inside("").mkdir(parents=True, exist_ok=True)
            case "USER":
                uid, gid = argument.split(":")
                stage.user = (int(uid), int(gid))
            case "RUN":
                run(stage, argument)
            case "COPY":
                copy(stage, argument, stages)
            case "VOLUME":
                stage.volumes += words(argument)
            case "HEALTHCHECK":
                stage.healthcheck = words(argument[argument.index("CMD") + 3 :].strip())
            case "ENTRYPOINT":
                stage.entrypoint = words(argument)
            case "CMD":
                stage.command = words(argument)
            case "LABEL" | "EXPOSE":
                pass
            case _:
                sys.exit(f"docker_check: {name} is not understood")
    assert stage is not None
    return stage


def ask(port: int, key: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/generate",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


def check(stage: Stage, work: Path) -> None:
    """Start the container, wait until it is healthy, ask it, stop it."""
    if stage.user[0] == 0:
        sys.exit("docker_check: the image runs as root")
    for number, path in enumerate(stage.volumes):
        volume = work / f"volume{number}"
        subprocess.run(["cp", "-a", stage.inside(path), volume], check=True)  # as Docker fills a fresh volume
        mount("--bind", volume, stage.inside(path))
    for read_only in (stage.root, *(stage.root / name for name in ("root", "home", "tmp", "run"))):
        mount("-o", "remount,ro", read_only)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = stage.env | {"SOFTPROMPT_PORT": str(port)}

    def healthy() -> bool:
        return stage.start(stage.healthcheck, env=env, stderr=subprocess.DEVNULL).wait() == 0

    if healthy():
        sys.exit("docker_check: the health check passes without a server")
    if stage.start([*stage.entrypoint, *stage.command], env=env).wait(START_SECONDS) != BAD_SETTINGS:
        sys.exit("docker_check: without a key the server must refuse to listen beyond the loopback address")
    made = stage.start([*stage.entrypoint, "keys", "create", "check"], env=env, stdout=subprocess.PIPE)
    key = made.communicate()[0].decode().strip()
    if made.returncode != 0 or not key.startswith("sk-"):
        sys.exit("docker_check: a key could not be made")
    began = time.monotonic()
    server = stage.start([*stage.entrypoint, *stage.command], env=env)
    try:
        while not healthy():
            if server.poll() is not None:
                sys.exit(f"docker_check: the server exited {server.returncode} before it was healthy")
            if time.monotonic() - began > START_SECONDS:
                sys.exit(f"docker_check: not healthy after {START_SECONDS} s")
            time.sleep(1)
        print(f"--- healthy after {time.monotonic() - began:.0f} s", flush=True)
        folders = [path for path in stage.inside(env["SOFTPROMPT_REGISTRY"]).iterdir() if path.is_dir()]
        tasks = sorted(path.name for path in folders if not path.name.startswith("."))
        for body in [{}, *({"task": task} for task in tasks[:1])]:
            answer = ask(port, key, body | {"input": "The capital of France is", "max_tokens": 8, "temperature": 0})
            print(f"--- {body or 'base model'}: {answer['outputs'][0]['text']!r}", flush=True)
            if answer["usage"]["completion_tokens"] < 1:
                sys.exit("docker_check: the answer has no tokens")
        if not healthy():
            sys.exit("docker_check: not healthy after the question")
        server.send_signal(signal.SIGTERM)
        status = server.wait(STOP_SECONDS)
        if status != 0:
            sys.exit(f"docker_check: SIGTERM ended the server with {status}, not 0")
    finally:
        server.kill()
        server.wait()
    print("docker_check: built, answered, wrote to its volumes only, stopped cleanly", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # set in the mount namespace
    options = parser.parse_args()
    if options.work is None:
        if os.geteuid() != 0 or shutil.which("unshare") is None:
            sys.exit("docker_check: needs root and unshare; with Docker, run the two commands in the Dockerfile")
        work = Path(tempfile.mkdtemp(prefix="docker-check-"))
        try:
            again = [sys.executable, __file__, *sys.argv[1:], "--work", str(work)]
            sys.exit(subprocess.call(["unshare", "--mount", *again]))
        finally:
            shutil.rmtree(work)
    build_args = dict(pair.split("=", 1) for pair in options.build_arg)
    check(build((REPO / "Dockerfile").read_text(encoding="utf-8"), build_args, options.work), options.work)


if __name__ == "__main__":
    main()
