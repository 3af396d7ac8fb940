"""README says what there is, and its commands do what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from typer.main import get_command

from app.base_model import BaseModel
from app.cli import main
from app.config import SECRETS, Settings, variables
from scripts.model_cards import newest
from tests.console import commands
from tests.peft_oracle import oracle_generate
from tests.shipped import PROMPTS, ROOT, SHIPPED

README = (ROOT / "README.md").read_text()


def test_every_setting_stands_in_the_readme_with_its_default() -> None:
    for variable, field in variables().items():
        row = next((line for line in README.splitlines() if line.startswith(f"| `{variable}`")), None)
        assert row is not None, f"{variable} is missing"
        description = Settings.model_fields[field].description
        assert description and description in row, f"{variable}: README says something else than the class"


def test_the_settings_table_has_no_other_rows_and_the_right_defaults() -> None:
    rows = re.findall(r"^\| `(SOFTPROMPT_\w+)` \| (?:`(.*?)`)? \|", README, re.M)
    assert [name for name, _ in rows] == list(variables())
    for name, shown in rows:
        default = Settings.model_fields[variables()[name]].get_default(call_default_factory=True)
        if isinstance(default, bool):
            assert shown == str(default).lower()
        elif name != "SOFTPROMPT_CACHE_DIR":  # of whoever runs this
            assert shown == ("" if default in (None, ()) else str(default)), name
    for secret in SECRETS:
        assert f"`SOFTPROMPT_{secret.upper()}_FILE`" in README


def test_every_command_stands_in_the_readme() -> None:
    root: Any = get_command(main.app)
    for name, command in root.commands.items():
        for sub in getattr(command, "commands", {"": None}):
            assert f"softprompt {name} {sub}".strip() in README, f"softprompt {name} {sub}"


def test_the_readme_names_every_make_target_it_uses() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make ([a-z-]+)`?", README)) <= targets


@pytest.fixture(scope="module")
def server(default_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real `softprompt serve` over a copy of the shipped prompts."""
    registry = tmp_path_factory.mktemp("registry") / "prompts"
    for name in SHIPPED:
        shutil.copytree(PROMPTS / name, registry / name)
    cache = str(default_base.path.parent.parent)
    settings = {"SOFTPROMPT_REGISTRY": str(registry), "SOFTPROMPT_CACHE_DIR": cache, "SOFTPROMPT_PORT": "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve"],
        cwd=ROOT,
        env=os.environ | settings | {"SOFTPROMPT_DEVICE": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    address = re.search(r"http://\S+", line)
    assert address, f"the server did not come up: {line!r}"
    yield address[0]
    process.terminate()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


@pytest.mark.model
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_readme_curls_answer_as_shown(server: str, tmp_path: Path) -> None:
    (tmp_path / "prompts").symlink_to(PROMPTS)
    examples = commands(README)
    assert len(examples) >= 4
    for command in examples:
        command.run(tmp_path, os.environ, {"http://127.0.0.1:8000": server})


@pytest.mark.model
def test_the_openai_example_prints_what_it_says(server: str) -> None:
    [code] = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "openai" in block]
    local = code.replace("http://127.0.0.1:8000", server)
    done = subprocess.run([sys.executable, "-c", local], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == code.splitlines()[-1].removeprefix("# ")


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_a_checkpoint_saved_by_peft_is_served_at_once_and_leaves_streams_alone(
    server: str, default_base: BaseModel, tmp_path: Path
) -> None:
    base = default_base
    folders = []
    for number in range(2):
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9)
        model = peft.get_peft_model(base.model, config)
        with torch.no_grad():
            rows = base.model.get_input_embeddings().weight[1000 * number + 500 : 1000 * number + 509]
            model.prompt_encoder["default"].embedding.weight.copy_(rows)
        model.save_pretrained(tmp_path / str(number))
        folders.append(tmp_path / str(number))
    base.model.requires_grad_(False)
    text = "The weather today"
    expected = [
        base.tokenizer.decode(oracle_generate(base.model, folder, base.tokenizer(text)["input_ids"], 30))
        for folder in folders
    ]
    assert expected[0] != expected[1]
    with httpx.Client(base_url=server, timeout=60) as client:
        body = {"task": "fresh", "input": text, "max_tokens": 30}

        def upload(folder: Path) -> httpx.Response:
            names = {"adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors"}
            return client.post(
                "/v1/tasks/fresh/versions", files={part: (folder / name).read_bytes() for part, name in names.items()}
            )

        def matches(answer: str, oracle: str) -> bool:
            # A token that ends the answer ends PEFT's too, which was told to go on.
            return bool(answer) and oracle.startswith(answer)

        assert client.post("/v1/generate", json=body).status_code == 404
        assert upload(folders[0]).status_code == 201
        with client.stream("POST", "/v1/generate", json={**body, "stream": True}) as stream:
            lines = (line for line in stream.iter_lines() if line.startswith("data: "))
            first = json.loads(next(lines)[6:])
            assert upload(folders[1]).status_code == 201
            after = client.post("/v1/generate", json=body).json()
            events = [first, *[json.loads(line[6:]) for line in lines if line != "data: [DONE]"]]
        assert (first["version"], events[-1]["version"], after["version"]) == (1, 1, 2)
        assert matches("".join(event.get("text", "") for event in events), expected[0])
        assert matches(after["outputs"][0]["text"], expected[1])


def score_row(task: str, metrics: dict[str, Any]) -> str:
    """The line of README's table that a manifest's metrics give."""
    name = next(iter(metrics["soft_prompt"]))
    floor = max(scores[name] for scores in metrics["floor"].values())
    told = [metrics[way][name] for way in ("zero_shot", "few_shot") if way in metrics]
    shown = f"{max(told):.3f} | " if told else "| "
    shown += f"{floor:.3f} | **{metrics['soft_prompt'][name]:.3f}**"
    return f"| `{task}` | {metrics['rows']} | {name.replace('_', ' ')} | {shown} |"


def test_the_table_of_shipped_prompts_is_what_their_manifests_say() -> None:
    for task in SHIPPED:
        manifest = json.loads((newest(PROMPTS / task) / "manifest.json").read_text())
        assert score_row(task, manifest["metrics"]) in README.splitlines(), task
