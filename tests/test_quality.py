"""The study of docs/quality.md: which cells it runs, what it keeps of them, and what of a prompt may be told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from app.text import Template
from app.train.data import Row, encode
from app.train.report import TrainReport
from benchmarks.quality import finetune, publish
from benchmarks.quality.predict import classify, label_scores
from benchmarks.quality.report import against, check_alike, chosen, chosen_method, ensemble, gather
from benchmarks.quality.run import RATES, cells, is_done
from benchmarks.quality.tasks import TASKS
from tests.tiny import tiny_model, tiny_tokenizer

SECRET = "a row of data that may not be shown"


def report(recipe: dict[str, Any]) -> TrainReport:
    return TrainReport(
        steps=8, best_step=8, best_validation_loss=0.5, curve=[], stopped="max_steps", seconds=1.0, trained_tokens=9,
        train_rows=4, validation_rows=2, data_digest="0", seed=0, template="{input}", base_name="base", recipe=recipe,
    )  # fmt: skip


def recipe(method: str) -> dict[str, Any]:
    return {
        "method": method, "init_text": SECRET, "num_virtual_tokens": 20, "max_steps": 8, "seed": 0, "batch_size": 2,
        "learning_rate": 0.3, "eval_every": 4, "eval_rows": 2, "patience": 3,
    }  # fmt: skip


def test_rows_that_a_cartridge_begins_with_are_told_nowhere() -> None:
    found = publish.told(report(recipe("cartridge")))
    assert SECRET not in json.dumps(found.as_dict())
    assert publish.command(TASKS["snli"], found.recipe) == ""
    plain = publish.told(report(recipe("prompt_tuning")))
    assert plain.recipe["init_text"] == SECRET, "which is an instruction there"


def test_the_command_is_one_that_the_command_line_takes() -> None:
    command = publish.command(TASKS["ingredients"], recipe("prompt_tuning") | {"residual": True})
    assert command.startswith("softprompt train ingredients --data data/ingredients --template '{input}\nFields:'")
    assert "--residual" in command and "--max-tokens 96" in command and "--classify" not in command
    assert "--precision" not in command
    exact = publish.command(TASKS["snli"], recipe("prompt_tuning") | {"precision": "float32"})
    assert exact.endswith("--precision float32 --classify")


def test_what_ships_in_half_is_what_was_trained_but_for_rounding(tmp_path: Path) -> None:
    trained, made = tmp_path / "trained", tmp_path / "made"
    trained.mkdir()
    made.mkdir()
    (trained / "adapter_config.json").write_text("{}")
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    save_file({"prompt_embeddings": tensor}, trained / "adapter_model.safetensors")
    assert publish.in_half(trained, made) == made and (made / "adapter_config.json").read_text() == "{}"
    [found] = load_file(made / "adapter_model.safetensors").values()
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), tensor, rtol=1e-3, atol=1e-4)


def test_every_method_gets_its_first_rate_on_every_task_before_any_gets_its_second() -> None:
    found = cells(["full", "soft20", "few_shot"], ["snli", "disfl_qa"], [0, 1], 2)
    assert [cell.name for cell in found[:6]] == [
        "snli.full.rate=0.0001.s0",
        "disfl_qa.full.rate=0.0001.s0",
        "snli.soft20.rate=0.3.s0",
        "disfl_qa.soft20.rate=0.3.s0",
        "snli.few_shot.s0",
        "disfl_qa.few_shot.s0",
    ]
    assert len(found) == len({cell.name for cell in found}) == 2 * (2 * 2 * 2 + 2)
    assert {len(rates) for rates in RATES.values()} == {2}, "all are tuned alike"


def test_the_rate_is_chosen_by_the_validation_loss_over_the_seeds() -> None:
    found = [
        {"method": "full", "rate": rate, "seed": seed, "validation_loss": loss}
        for rate, losses in ((1e-4, (0.1, 0.9)), (3e-5, (0.4, 0.4)))
        for seed, loss in enumerate(losses)
    ]
    assert [(cell["rate"], cell["seed"]) for cell in chosen(found)] == [(3e-5, 0), (3e-5, 1)]
    assert chosen_method([*found, {"method": "soft20", "validation_loss": 0.44}]) == "soft20"


@pytest.mark.parametrize(
    ("cell", "done"),
    [
        ({"answers": []}, True),
        ({"train_seconds": 1.0, "epochs": 8, "matrices": "float32"}, True),
        ({"train_seconds": 1.0, "epochs": 8, "matrices": "bfloat16"}, False),
        ({"train_seconds": 1.0, "epochs": 4, "matrices": "float32"}, False),
        ({"train_seconds": 1.0}, False),
    ],
)
def test_a_cell_of_other_passes_or_precision_is_run_anew(tmp_path: Path, cell: dict[str, Any], done: bool) -> None:
    path = tmp_path / "cell.json"
    assert not is_done(path, 8, "float32")
    path.write_text(json.dumps(cell))
    assert is_done(path, 8, "float32") is done


def test_labels_that_share_a_row_score_as_if_each_were_alone() -> None:
    model, tokenizer, template = tiny_model("llama"), tiny_tokenizer(), Template("{input}\nForm:")
    labels = ["a", "bad", "bad weather", "of the weather", "it"]
    inputs = ["the weather", "x", "a bad day that never ends", "it is", "on and on and on it goes"]

    def alone(text: str, label: str) -> float:
        prompt = tokenizer(template.prompt(text))["input_ids"]
        target = tokenizer(template.target(label), add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([prompt + target])).logits[0].double().log_softmax(-1)
        return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(target))

    with torch.no_grad():
        scores = [[alone(text, label) for label in labels] for text in inputs]
    expected = [labels[row.index(max(row))] for row in scores]
    assert classify(model, tokenizer, template, labels, inputs) == expected
    found = label_scores(model, tokenizer, template, labels, inputs)
    assert found.numpy() == pytest.approx(np.array(scores), abs=1e-3)


@pytest.mark.parametrize(("patience", "passes"), [(1, 3), (2, 6), (9, 7)])
def test_a_baseline_ends_when_passes_are_no_better(monkeypatch: pytest.MonkeyPatch, patience: int, passes: int) -> None:
    losses = iter([5.0, 4.0, 3.0, 3.5, 2.0, 2.5, 2.6, 2.7])
    monkeypatch.setattr(finetune, "_validate", lambda *_: next(losses))
    tokenizer = tiny_tokenizer()
    rows = encode([Row("the weather", "bad"), Row("it is", "a")], tokenizer, Template("{input}:"), 64)
    model = tiny_model("llama").requires_grad_(True)
    tuned = finetune.finetune(
        model, rows, rows, kind="full", learning_rate=1e-3, epochs=7, batch_size=2, seed=0, patience=patience
    )
    assert len(tuned.losses) == tuned.steps == passes
    assert tuned.validation_loss == min(tuned.losses)


def test_an_ensemble_answers_by_the_mean_of_probabilities() -> None:
    labels = ["a", "b"]
    sure = {"labels": labels, "label_scores": [[math.log(0.9), math.log(0.1)], [-800.0, -801.0]]}
    unsure = {"labels": labels, "label_scores": [[math.log(0.4), math.log(0.6)], [-1.0, 0.0]]}
    least = {"labels": labels, "label_scores": [[-5.0, -5.1], [-1.0, -0.9]]}
    assert ensemble([sure, unsure]) == ["a", "a"], "0.65 and, exactly between, the first"
    assert ensemble([sure, unsure, least]) == ["a", "b"]
    assert ensemble([sure]) is None and ensemble([sure, {"answers": []}]) is None


def test_what_is_known_of_a_cell_has_no_text_and_does_for_another_machine(tmp_path: Path) -> None:
    folder = tmp_path / "disfl_qa"
    folder.mkdir()
    rows = [{"input": f"question {i}", "target": f"{SECRET} {i}"} for i in range(4)]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def cell(method: str, right: int, **told: Any) -> dict[str, Any]:
        answers = [f"{SECRET} {i if i < right else 9}\n" for i in range(4)]
        return {
            "task": "disfl_qa",
            "method": method,
            "seed": 0,
            "recipe": {"init_text": SECRET},
            **told,
            "answers": answers,
        }

    first = gather([cell("full", 1, rate=1e-4), cell("soft20", 3, rate=0.3)], [], tmp_path)
    assert SECRET not in json.dumps(first)
    assert [(one["method"], one["right"], one["scores"]["exact_match"]) for one in first] == [
        ("full", "1000", 0.25),
        ("soft20", "1110", 0.75),
    ]
    again = gather([cell("full", 2, rate=1e-4), cell("full", 4, rate=3e-5)], first, tmp_path)
    assert [(one["method"], one["rate"], one["right"]) for one in again] == [
        ("full", 1e-4, "1100"),
        ("full", 3e-5, "1111"),
        ("soft20", 0.3, "1110"),
    ], "the newer of one that is in both, and the others"
    assert gather([], again, tmp_path) == again
    longer = gather([cell("full", 3, rate=1e-4, epochs=8)], again, tmp_path)
    assert [(one["method"], one["right"]) for one in longer] == [("full", "1110"), ("soft20", "1110")], (
        "not of two lengths"
    )


def test_the_ensemble_is_of_our_methods_near_the_best_at_their_chosen_rates(tmp_path: Path) -> None:
    folder = tmp_path / "snli"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"input": "it", "target": "b"}) + "\n")

    def cell(method: str, rate: float, loss: float, a: float) -> dict[str, Any]:
        scores = [[math.log(a), math.log(1 - a)]]
        told = {"task": "snli", "method": method, "rate": rate, "seed": 0, "validation_loss": loss}
        return told | {"answers": ["a"], "labels": ["a", "b"], "label_scores": scores}

    own = [cell("soft20", 0.3, 0.9, 0.99), cell("soft20", 0.1, 0.2, 0.3), cell("cartridge160", 0.02, 0.219, 0.4)]
    own.append(cell("prefix20", 0.02, 0.221, 0.99))
    [found] = [one for one in gather(own, [], tmp_path) if one["method"] == "ensemble"]
    known = [{"task": "snli", "method": "ensemble", "seed": 0, "members": ["old"], "scores": {}}]
    assert not [one for one in gather(own[:2], known, tmp_path) if one["method"] == "ensemble"], "of others"
    assert found["members"] == ["cartridge160.s0", "soft20.s0"] and found["right"] == "1", (
        "either of the others would outvote them"
    )


def test_cells_are_compared_on_the_rows_that_both_answered() -> None:
    one, other = {"right": "1" * 60 + "0" * 40}, {"right": "0" * 100}
    low, high = (float(bound) for bound in against(one, other).split(" to "))
    assert 48 < low < 60 < high < 72
    assert against(one, one) == "+0.0 to +0.0"
    assert against(one, {"scores": {}}) == "", "of an older cell only the scores are known"
    with pytest.raises(SystemExit, match=r"answered \[99, 100\] rows"):
        check_alike("snli", {"full": [one], "lora": [{"right": "1" * 99}]})
    with pytest.raises(SystemExit, match="passes"):
        check_alike("snli", {"full": [one | {"epochs": 3}, one | {"epochs": 4}]})
