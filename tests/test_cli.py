"""The command line on a tiny base: from rows to a published, scored task."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from app import __version__
from app.base_model import load_base_model
from app.checkpoint import CONFIG_FILE, TENSORS_FILE, read_checkpoint
from app.cli import main
from app.errors import InvalidRecipe, InvalidRequest
from app.manifest import Calibration, Defaults, ManifestInput
from app.registry import Registry, Store
from app.train.calibration import Judged
from app.train.precision import cpu_has_bfloat16
from app.train.recipe import METHODS
from tests.api_harness import files
from tests.cli_harness import run
from tests.shared_kernel import share_kernel
from tests.test_html_report import Page
from tests.tiny import save_tiny

runner = CliRunner()
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_tiny(tmp_path / "tiny", "llama")
    share_kernel(tmp_path / "cache")
    monkeypatch.setenv("SOFTPROMPT_MODEL", str(tmp_path / "tiny"))
    monkeypatch.setenv("SOFTPROMPT_REGISTRY", str(tmp_path / "prompts"))
    monkeypatch.setenv("SOFTPROMPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SOFTPROMPT_KV_CACHE_TOKENS", "4096")
    rng = random.Random(0)
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 40), ("validation", 10), ("test", 12)):
        rows = [(f"{rng.choice(['good', 'fine'])} {i}", "pos") for i in range(count)]
        rows += [(f"{rng.choice(['bad', 'poor'])} {i}", "neg") for i in range(count)]
        lines = [json.dumps({"input": text, "target": target}) for text, target in rows]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def invoke(*arguments: str) -> Result:
    return runner.invoke(main.app, arguments, catch_exceptions=False)


TRAIN = ("--template", r"{input}\nMood:", "--steps", "12", "--batch-size", "8", "--eval-every", "6")


def registry(home: Path) -> Registry:
    return Registry(Store(home / "prompts"), load_base_model(str(home / "tiny"), cache_dir=home / "cache").info)


def test_train_scores_and_publishes_a_classifier(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(judged: Judged) -> Calibration:  # the tiny model is right too seldom for the real one
        return Calibration(temperature=len(judged) / 10, rows=len(judged))

    monkeypatch.setattr("app.train.job.fit", fit)
    monkeypatch.setattr("app.cli.train.fit", fit)
    arguments = ("train", "mood", "--data", str(home / "data"), "--classify", *TRAIN)
    result = run(
        *(*arguments, "--init-text", "Is it good?", "--source", "licence=MIT", "--description", "Moods.", "--json")
    )
    version = registry(home).resolve("mood")
    assert result.document["reference"] == "mood:1" and result.document["digest"] == version.digest
    assert result.document["metrics"] == version.manifest.metrics
    manifest = version.manifest
    assert version.reference == "mood:1"
    assert (manifest.template, manifest.labels) == ("{input}\nMood:", ["neg", "pos"])
    assert manifest.description == "Moods." and manifest.lineage["data"]["licence"] == "MIT"
    assert manifest.lineage["recipe"]["max_steps"] == 12 and manifest.lineage["steps"] == 12
    assert manifest.lineage["precision"] == ("bfloat16" if cpu_has_bfloat16() else "float32")
    assert manifest.metrics["rows"] == 24
    for contestant in ("soft_prompt", "zero_shot"):
        assert 0 <= manifest.metrics[contestant]["accuracy"] <= 1
    assert manifest.metrics["floor"]["constant"]["accuracy"] == 0.5
    assert manifest.metrics["floor"]["naive_bayes"]["accuracy"] == 1.0  # good, fine, bad, poor
    config = json.loads(registry(home).read_file("mood", 1, CONFIG_FILE))
    assert config["base_model_name_or_path"] == "tiny", "a machine's path has no business in a published file"

    test_rows = str(home / "data" / "test.jsonl")
    found = run("eval", "mood@latest", "--data", test_rows, "--json").document
    assert found["evaluation"]["scores"] == manifest.metrics["soft_prompt"] and found["rows"] == 24
    assert found["evaluation"]["name"] == "mood:1" and found["against"] is None and found["differences"] == {}
    assert sum(map(sum, found["evaluation"]["confusion"]["counts"])) == 24
    assert [point["step"] for point in manifest.lineage["curve"]] == [0, 6, 12]

    page, answers = home / "out.html", home / "answers.jsonl"
    done = run("eval", "mood:1", "--against", "tiny", "--data", test_rows, "--report", page, "--answers", answers)
    head, *lines = done.out.splitlines()
    assert head.split() == ["score", "mood:1", "95", "%", "tiny", "95", "%", "difference", "95", "%"]
    assert [line.split()[0] for line in lines] == ["accuracy", "macro_f1", "ece", "ece_calibrated", "(24"]
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [record["row"] for record in records] == list(range(1, 25)) and records[0]["source"] == "test.jsonl:1"
    right = sum(record["right"] for record in records)
    assert round(right / 24, 4) == manifest.metrics["soft_prompt"]["accuracy"]
    assert {record["against"] for record in records} <= {"neg", "pos"}, "the base is asked as the version is"
    assert all(sum(record["probabilities"].values()) == pytest.approx(1) for record in records)
    shown = Page(page.read_text()).text
    assert "mood:1" in shown and "Loss" in shown and "Confusion" in shown and f"{24 - right}, the worst first" in shown

    assert manifest.calibration is not None
    assert manifest.calibration.temperature == 2.0, "fitted on the 20 validation rows, never on the 24 of the test"
    assert {"ece", "ece_calibrated"} < manifest.metrics["soft_prompt"].keys()

    arguments = ("calibrate", "mood", "--data", str(home / "data" / "train.jsonl"))
    result = invoke(*arguments)
    assert result.exit_code == 0 and "published mood:2" in result.stdout and "(80 rows)" in result.stdout
    task = registry(home).task("mood")
    one, two = task.versions.values()
    assert task.aliases["latest"].version == 2 and one.digest != two.digest, "other probabilities"
    assert one.files[TENSORS_FILE] == two.files[TENSORS_FILE] and one.files[CONFIG_FILE] == two.files[CONFIG_FILE]
    assert two.manifest.calibration == Calibration(temperature=8.0, rows=80)
    assert two.manifest.lineage["calibration"]["version"] == "mood:1" and two.manifest.metrics == manifest.metrics
    registry(home).pin("mood:2").release()
    assert "was published before as mood:2" in invoke(*arguments[:1], "mood:1", *arguments[2:]).stdout


def test_train_by_other_methods_and_from_another_prompt(home: Path) -> None:
    data = ("--data", str(home / "data"), "--virtual-tokens", "4", *TRAIN, "--steps", "4", "--no-baselines")
    invoke("train", "first", *data, "--init-text", "Is it good?", "--residual")
    arguments = ("train", "second", *data[:2], *data[4:], "--init-from", "first", "--method", "cartridge")
    assert invoke(*arguments, "--learning-rate", "auto", "--budget", "1m").exit_code == 0
    first, second = (registry(home).resolve(name) for name in ("first", "second"))
    assert first.manifest.lineage["recipe"]["residual"] is True
    lineage = second.manifest.lineage
    assert lineage["started_from"] == "first:1" and lineage["recipe"]["init"] == "prompt"
    assert lineage["recipe"]["budget_seconds"] == 60 and len(lineage["trials"]) == 3
    config = json.loads(registry(home).read_file("second", 1, CONFIG_FILE))
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("CARTRIDGE", 4)
    with pytest.raises(InvalidRequest, match="no --init"):
        invoke(*arguments, "--init", "labels")
    with pytest.raises(InvalidRecipe, match="method must be one of"):
        invoke("train", "third", *data, "--method", "lora")
    for option, value in (("--budget", "soon"), ("--learning-rate", "fast")):
        assert invoke("train", "third", *data, option, value).exit_code == 2


def test_train_one_of_several_tasks(home: Path) -> None:
    for path in (home / "data").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{**row, "task": "mood"} for row in rows] + [
            {**row, "task": "x", "target": row["input"]} for row in rows
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--method", "multitask_prompt_tuning", "--classify", *TRAIN, "--steps", "2", "--no-baselines")
    assert invoke("train", "mood", "--data", str(home / "data"), *options, "--for-task", "mood").exit_code == 0
    manifest = registry(home).resolve("mood").manifest
    assert (manifest.task_id, manifest.labels, manifest.metrics["rows"]) == (0, ["neg", "pos"], 24)
    assert manifest.lineage["tasks"] == ["mood", "x"]
    options = options[:2] + options[3:]
    assert (
        invoke("train", "x", "--data", str(home / "data"), *options, "--for-task", "x", "--max-tokens", "2").exit_code
        == 0
    )
    assert registry(home).resolve("x").manifest.task_id == 1
    with pytest.raises(InvalidRequest, match="has the task 'z'"):
        invoke("train", "z", "--data", str(home / "data"), *options, "--for-task", "z")


def test_the_help_names_every_method() -> None:
    for name in METHODS:
        assert name in main._METHODS


def test_only_classifiers_are_calibrated(home: Path) -> None:
    given = files()
    info = load_base_model(str(home / "tiny"), cache_dir=home / "cache").info
    checkpoint = read_checkpoint(given["adapter_config"], given["adapter_model"], ManifestInput(), info)
    registry(home).publish("mood", checkpoint)
    with pytest.raises(InvalidRequest, match="mood:1 has no labels"):
        invoke("calibrate", "mood", "--data", str(home / "data" / "train.jsonl"))
    assert list(registry(home).task("mood").versions) == [1]


def test_train_generates_without_labels_and_can_leave_aliases_alone(home: Path) -> None:
    arguments = ("train", "mood", "--data", str(home / "data"), *TRAIN, "--max-tokens", "4", "--stop", r"\n")
    result = invoke(*arguments, "--alias", "", "--no-baselines")
    assert result.exit_code == 0, result.output
    task = registry(home).task("mood")
    assert dict(task.aliases) == {}
    manifest = task.versions[1].manifest
    assert manifest.labels is None and manifest.defaults.max_tokens == 4 and manifest.defaults.stop == ["\n"]
    assert set(manifest.metrics["soft_prompt"]) == {"exact_match", "rouge_l", "bleu", "chrf"}
    assert "zero_shot" not in manifest.metrics and set(manifest.metrics["floor"]) == {"constant", "copy"}


def test_two_versions_are_compared_on_the_same_rows(home: Path) -> None:
    info = load_base_model(str(home / "tiny"), cache_dir=home / "cache").info
    for content, manifest in (
        (0.5, ManifestInput(template="{input}\nMood:", defaults=Defaults(max_tokens=2))),
        (0.75, ManifestInput(template="{input}\nMood:", labels=["neg", "pos"])),
    ):
        given = files(content)
        registry(home).publish("mood", read_checkpoint(given["adapter_config"], given["adapter_model"], manifest, info))
    rows = home / "rows.jsonl"
    rows.write_text(json.dumps({"input": "good", "target": "pos", "references": ["positive"]}) + "\n")
    found = run("eval", "mood:2", "--against", "mood:1", "--data", rows, "--json").document
    assert (found["evaluation"]["name"], found["against"]["name"]) == ("mood:2", "mood:1")
    assert set(found["differences"]) == {"accuracy", "macro_f1"}, "the second generates; it is held against labels"
    back = run("eval", "mood:1", "--against", "mood:2", "--data", rows, "--json").document
    assert {"exact_match", "rouge_l", "bleu", "chrf"} == set(back["differences"])
    assert back["evaluation"]["signatures"]["bleu"].startswith("nrefs:2|")
    score = back["evaluation"]["scores"]["rouge_l"] - back["against"]["scores"]["rouge_l"]
    assert back["differences"]["rouge_l"] == {"difference": pytest.approx(score), "interval": [score, score]}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--report", "HOME/nowhere/out.html"),
        ("--answers", "HOME/data"),
        ("--answers", "HOME/data/test.jsonl"),
        ("--seed", "-1"),
    ],
)
def test_eval_refuses_before_it_asks_anything(home: Path, arguments: tuple[str, str]) -> None:
    data = home / "data" / "test.jsonl"
    before = data.read_bytes()
    filled = [argument.replace("HOME", str(home)) for argument in arguments]
    assert run("eval", "nothing", "--data", data, *filled, expect=2).out == "" and data.read_bytes() == before


def test_model_show_is_json(home: Path) -> None:
    assert run("model", "pull", "--json").document == {"path": str(home / "tiny")}
    facts = run("model", "show", "--json").document
    assert facts["name"] == "tiny" and facts["hidden_size"] == 32 and Path(facts["path"]) == home / "tiny"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["eval", "nothing", "--data", "DATA/test.jsonl"], 4, "not"),
        (["train", "mood", "--data", "DATA/missing"], 1, "neither a file nor a folder"),
        (["train", "Bad Name", "--data", "DATA", *TRAIN], 2, "name"),
        (["train", "mood", "--data", "DATA", "--steps", "0"], 2, "max_steps"),
        (["train", "mood", "--data", "DATA", "--learning-rate", "nan"], 2, "learning_rate"),
        (["train", "mood", "--data", "DATA", "--template", "no placeholder"], 2, "{input}"),
    ],
)
def test_errors_are_one_readable_line(home: Path, arguments: list[str], code: int, message: str) -> None:
    filled = [argument.replace("DATA", str(home / "data")) for argument in arguments]
    told = run(*filled, expect=code).err
    assert message in told and "Traceback" not in told and told.startswith("error (")


def test_version() -> None:
    assert invoke("--version").stdout.strip() == __version__
