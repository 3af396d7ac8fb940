"""Every method of training: it learns, moves nothing but its own, leaves what PEFT and our engine read, and resumes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from app.checkpoint import CONFIG_FILE, TENSORS_FILE, Checkpoint, read_checkpoint
from app.engine.local import LocalEngine
from app.errors import InvalidRecipe, InvalidTrainingData, TrainingFailed
from app.manifest import ManifestInput
from app.soft_prompt import BaseInfo
from app.text import Template
from app.train import Progress, Recipe, Row, TrainReport
from app.train.data import encode
from app.train.forward import Batch, answer_nll, can_share
from app.train.initial import embedding_rms, embedding_weight, keys_and_values
from app.train.methods import Setup, build
from app.train.recipe import METHODS
from app.train.schedule import learning_rate, next_plan
from app.train.sweep import sweep
from app.train.trainer import train
from tests.tiny import MAX_MODEL_LEN, tiny_info, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.anyio
TOKENIZER = tiny_tokenizer()
TEMPLATE = Template("{input}:")
WORDS = {"red": "pos", "blue": "neg", "pink": "pos", "grey": "neg"}
ROWS = [Row(f"{before} {word}", answer) for word, answer in WORDS.items() for before in ("a", "the", "one", "no", "an")]
TRAIN, VALIDATION = ROWS[::2], ROWS[1::2]
VARIANTS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {},
    "prompt_tuning residual": {"residual": True, "residual_size": 8},
    "p_tuning": {"encoder_hidden_size": 12, "learning_rate": 0.04},
    "p_tuning lstm": {"encoder": "lstm", "encoder_hidden_size": 12, "learning_rate": 0.1},
    "prefix_tuning": {"learning_rate": 0.05},
    "prefix_tuning residual": {"learning_rate": 0.05, "residual": True, "residual_size": 8},
    "cartridge": {"learning_rate": 0.05},
    "multitask_prompt_tuning": {"num_ranks": 2},
    "cpt": {"num_virtual_tokens": 40, "cpt_epsilon": 1.0},
}


def recipe_of(variant: str, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "method": variant.split()[0],
        "num_virtual_tokens": 5,
        "init_text": "is it good",
        "batch_size": 4,
        "max_steps": 12,
        "warmup_steps": 2,
        "eval_every": 4,
        "checkpoint_every": 3,
        "precision": "float32",
    }
    return Recipe(**(fields | VARIANTS[variant] | changes))


def rows_of(recipe: Recipe, rows: list[Row]) -> list[Row]:
    """For several tasks, rows of two that contradict each other."""
    if recipe.method != "multitask_prompt_tuning":
        return rows
    other = {"pos": "neg", "neg": "pos"}
    return [replace(row, task="a") for row in rows] + [replace(r, task="b", target=other[r.target]) for r in rows]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


def run(model: Any, recipe: Recipe, out: Path, **changes: Any) -> TrainReport:
    options: dict[str, Any] = {
        "rows_train": rows_of(recipe, TRAIN),
        "rows_validation": rows_of(recipe, VALIDATION),
        "template": TEMPLATE,
        "base_name": "tiny-llama",
    }
    return train(model, TOKENIZER, recipe=recipe, out_dir=out, **(options | changes))


def setup_of(model: Any, recipe: Recipe, **changes: Any) -> Setup:
    options: dict[str, Any] = {"rows": TRAIN, "template": TEMPLATE, "tasks": ("",)}
    return Setup(model=model, tokenizer=TOKENIZER, recipe=recipe, **(options | changes))


def digest_of(model: Any) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())).hexdigest()


def read(folder: Path, info: BaseInfo, task_id: int = 0) -> Checkpoint:
    config, tensors = ((folder / name).read_bytes() for name in (CONFIG_FILE, TENSORS_FILE))
    return read_checkpoint(config, tensors, ManifestInput(task_id=task_id), info)


def losses(model: Any, prompt: Tensor, rows: list[Row]) -> list[float]:
    """Mean of each row's answer, one row at a time."""
    found = []
    for example in encode(rows, TOKENIZER, TEMPLATE, MAX_MODEL_LEN):
        batch = Batch.of([example], torch.device("cpu"))
        found.append(answer_nll(model, prompt, batch, shared=False).mean().item())
    return found


def peft_loss(peft: Any, row: Row, **more: Any) -> float:
    [example] = encode([row], TOKENIZER, TEMPLATE, MAX_MODEL_LEN)
    ids = torch.tensor([example.ids])
    logits = peft(input_ids=ids, **more).logits[0, -len(example.ids) :]
    answers = range(example.start, len(example.ids))
    chosen = logits.log_softmax(dim=-1)[[i - 1 for i in answers], [example.ids[i] for i in answers]]
    return -chosen.mean().item()


@pytest.mark.parametrize("variant", VARIANTS)
async def test_it_learns_and_peft_and_the_engine_read_it(model: Any, tmp_path: Path, variant: str) -> None:
    recipe = recipe_of(variant, max_steps=32, eval_every=8)
    if variant != "cpt":
        recipe = replace(recipe, learning_rate=2 * recipe.learning_rate)  # type: ignore[operator]
    before = digest_of(model)
    report = run(model, recipe, tmp_path)
    assert digest_of(model) == before and not any(p.requires_grad for p in model.parameters())
    info, tasks = tiny_info(model), report.tasks or [""]
    start = loss_at_start(model, recipe)
    assert report.best_validation_loss == min(point["validation_loss"] for point in report.curve)
    assert report.best_validation_loss < 0.9 * start, (start, report.best_validation_loss)

    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["peft_type"] == recipe.method.upper() and config["base_model_name_or_path"] == "tiny-llama"
    engine = LocalEngine(model, info, kv_cache_tokens=2_048)
    engine.start()
    try:
        for task_id, task in enumerate(tasks):
            checkpoint = read(tmp_path, info, task_id)
            assert checkpoint.prompt.kind == ("kv" if recipe.method in ("prefix_tuning", "cartridge") else "embedding")
            rows = [row for row in rows_of(recipe, VALIDATION) if row.task == task]
            ours = losses(model, checkpoint.prompt.tensor, rows)
            peft: Any = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path)).eval()
            more = {"task_ids": torch.tensor([task_id])} if report.tasks else {}
            more |= {"labels": None} if recipe.method == "cpt" else {}
            with torch.no_grad():
                theirs = [peft_loss(peft, row, **more) for row in rows]
            assert theirs == pytest.approx(ours, abs=2e-5)
            examples = encode(rows[:3], TOKENIZER, TEMPLATE, MAX_MODEL_LEN)
            for example, loss in zip(examples, ours[:3], strict=True):
                [found] = await engine.score(
                    checkpoint.prompt, list(example.ids[: example.start]), [list(example.ids[example.start :])]
                )
                assert -sum(found) / len(found) == pytest.approx(loss, abs=2e-4)
    finally:
        engine.stop()
    # the file is the prompt with the least loss that training saw
    whole = [
        answer_nll(model, read(tmp_path, info, i).prompt.tensor, Batch.of(part, torch.device("cpu")), shared=False)
        for i, task in enumerate(tasks)
        if (part := encode([r for r in rows_of(recipe, VALIDATION) if r.task == task], TOKENIZER, TEMPLATE, 500))
    ]
    assert torch.cat(whole).mean().item() == pytest.approx(report.best_validation_loss, abs=1e-5)


def loss_at_start(model: Any, recipe: Recipe) -> float:
    """Validation loss before any step."""
    rows = rows_of(recipe, VALIDATION)
    tasks = sorted({row.task for row in rows})
    method = build(setup_of(model, recipe, tasks=tasks, rows=rows_of(recipe, TRAIN)))
    batch = Batch.of(encode(rows, TOKENIZER, TEMPLATE, MAX_MODEL_LEN, tasks), torch.device("cpu"))
    return answer_nll(model, method.prompt(), batch, shared=False).mean().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_it_ends_as_if_uninterrupted(
    model: Any, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(variant)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run(model, recipe, whole)
    for last, killed in ((5, False), (8, True)):

        def end(progress: Progress, last: int = last, killed: bool = killed) -> None:
            if progress.step == last:
                if killed:  # then nothing is written any more
                    monkeypatch.setattr("app.train.loop.save_checkpoint", lambda *_: None)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(model, recipe, parts, on_progress=end)
        monkeypatch.undo()
    steps: list[int] = []
    found = run(model, recipe, parts, on_progress=lambda progress: steps.append(progress.step))
    assert steps == [9, 10, 11, 12]
    assert {**found.as_dict(), "seconds": 0} == {**expected.as_dict(), "seconds": 0}
    for name in (CONFIG_FILE, TENSORS_FILE):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_begins_where_it_was_told_to(model: Any, variant: str) -> None:
    recipe = recipe_of(variant)
    method = build(setup_of(model, recipe, tasks=["a", "b"] if "multitask" in variant else [""]))
    with torch.no_grad():
        prompt = method.prompt()
    text = TOKENIZER("is it good", add_special_tokens=False)["input_ids"]
    if recipe.method == "cpt":
        ids = method.config.cpt_token_ids  # type: ignore[attr-defined]
        assert ids[: len(text)] == text and 20 < len(ids) <= 40
        assert TOKENIZER.decode(ids[len(text) :]).count("\n\n") >= 2, "the separator, and at least one row"
        torch.testing.assert_close(prompt, model.get_input_embeddings().weight[ids])
        return
    start = model.get_input_embeddings().weight[[text[i % len(text)] for i in range(5)]]
    if prompt.dim() == 5:
        start = keys_and_values(model, start)
    torch.testing.assert_close(prompt, start.expand_as(prompt), atol=1e-5, rtol=1e-5)
    groups = [parameter for group in method.groups() for parameter in group.parameters]
    assert len({id(parameter) for parameter in groups}) == len(groups)
    assert not {id(parameter) for parameter in model.parameters()} & {id(parameter) for parameter in groups}


def test_starts_from_labels_vocabulary_and_prompts(model: Any) -> None:
    weight = embedding_weight(model)

    def prompt(variant: str = "prompt_tuning", **changes: Any) -> Tensor:
        initial = changes.pop("initial", None)
        recipe = recipe_of(variant, init_text="", **changes)
        return build(setup_of(model, recipe, initial=initial)).prompt().detach()

    rows = TOKENIZER(["pos", "neg"], add_special_tokens=False)["input_ids"]
    means = [weight[ids].mean(dim=0) for ids in rows]
    labels = prompt(init="labels")
    assert any(len(ids) > 1 for ids in rows)
    for mean in means:
        assert (labels[:2] - mean).abs().amax(dim=1).min() < 1e-6
    drawn = prompt(init="vocabulary")
    torch.testing.assert_close(labels[2:], drawn[2:])
    assert all((weight == row).all(dim=1).any() for row in drawn)
    assert not torch.equal(drawn, prompt(init="vocabulary", seed=1))
    given = torch.randn(5, 32)
    torch.testing.assert_close(prompt(init="prompt", initial=given), given)
    keys = keys_and_values(model, given)
    torch.testing.assert_close(prompt("prefix_tuning", init="prompt", initial=given), keys)
    torch.testing.assert_close(prompt("cartridge", initial=2 * keys), 2 * keys)


def test_keys_and_values_of_a_text_stand_for_the_text(model: Any) -> None:
    """A cartridge before its first step answers as the text itself would."""
    method = build(setup_of(model, recipe_of("cartridge", num_virtual_tokens=7)))
    text = TOKENIZER("is it good", add_special_tokens=False)["input_ids"]
    ids = [text[i % len(text)] for i in range(7)]
    embeddings = model.get_input_embeddings().weight[ids]
    assert losses(model, method.prompt(), ROWS[:3]) == pytest.approx(losses(model, embeddings, ROWS[:3]), abs=1e-5)


def test_keys_and_values_move_in_units_of_their_layer(model: Any, tmp_path: Path) -> None:
    """AdamW's first step has the size of its rate."""
    with torch.no_grad():
        model.get_decoder().layers[1].self_attn.v_proj.weight.mul_(5)
    recipe = recipe_of("prefix_tuning", max_steps=1, warmup_steps=0, eval_every=1, learning_rate=0.01)
    start = build(setup_of(model, recipe)).prompt().detach()
    run(model, recipe, tmp_path)
    moved = (read(tmp_path, tiny_info(model)).prompt.tensor - start).abs().amax(dim=(2, 3, 4))
    torch.testing.assert_close(moved, 0.01 * start.square().mean(dim=(2, 3, 4)).sqrt(), atol=1e-5, rtol=0.01)
    assert moved.max() > 1.5 * moved.min()


def test_a_cartridge_keeps_its_first_tokens(model: Any, tmp_path: Path) -> None:
    recipe = recipe_of("cartridge", num_frozen_tokens=2)
    start = build(setup_of(model, recipe)).prompt().detach()
    run(model, recipe, tmp_path)
    found = read(tmp_path, tiny_info(model)).prompt.tensor
    moved = (found - start).abs().amax(dim=(0, 1, 2, 4))
    assert moved[:2].max() < 1e-6 and moved[2:].min() > 1e-4


def test_cpt_moves_no_answer_and_no_token_too_far(model: Any, tmp_path: Path) -> None:
    recipe = recipe_of("cpt", cpt_epsilon=0.1, learning_rate=1.0, max_steps=20)
    run(model, recipe, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    ids, types = config["cpt_token_ids"], torch.tensor(config["cpt_tokens_type_mask"])
    moved = (read(tmp_path, tiny_info(model)).prompt.tensor - embedding_weight(model)[ids]).norm(dim=1)
    most = 0.1 * embedding_rms(model) * 32**0.5
    assert most == pytest.approx(config["opt_projection_epsilon"] * (32 / 2048) ** 0.5)
    answers = types % 4 == 0
    assert answers.any() and moved[answers].max() == 0
    assert moved.max() <= most * 1.0001 and moved[~answers].max() > 0.9 * most
    answered = TOKENIZER.decode([i for i, is_answer in zip(ids, answers, strict=True) if is_answer])
    assert "pos" in answered and "neg" in answered


def test_each_task_of_several_has_a_prompt_of_its_own(model: Any, tmp_path: Path) -> None:
    """Padded rows of both tasks in one batch lose what they lose alone, behind their own task's prompt."""
    recipe = recipe_of("multitask_prompt_tuning", max_steps=20, learning_rate=0.5)
    report = run(model, recipe, tmp_path)
    assert report.tasks == ["a", "b"]
    info = tiny_info(model)
    prompts = torch.stack([read(tmp_path, info, task_id).prompt.tensor for task_id in (0, 1)])
    assert (prompts[0] - prompts[1]).abs().max() > 0.01
    rows = rows_of(recipe, VALIDATION)
    examples = encode(rows, TOKENIZER, TEMPLATE, MAX_MODEL_LEN, report.tasks)
    together = Batch.of(examples, torch.device("cpu"))
    alone = torch.cat(
        [answer_nll(model, prompts[e.task], Batch.of([e], torch.device("cpu")), shared=False) for e in examples]
    )
    for shared in (True, False):
        torch.testing.assert_close(answer_nll(model, prompts, together, shared=shared), alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(InvalidTrainingData, match="row 1: no row that is trained on has its task"):
        run(model, recipe, tmp_path / "other", rows_validation=[replace(rows[0], task="c")])


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "gemma2", "gemma3"])
@pytest.mark.parametrize("variant", ["prompt_tuning", "prefix_tuning"])
def test_other_architectures(tmp_path: Path, variant: str, architecture: str) -> None:
    """With windows, caps, scaled embeddings or no KV groups: the file still is what training saw."""
    model = tiny_model(architecture)
    recipe = recipe_of(variant, max_steps=4, eval_every=2)
    report = run(model, recipe, tmp_path)
    checkpoint = read(tmp_path, tiny_info(model))
    examples = encode(VALIDATION, TOKENIZER, TEMPLATE, MAX_MODEL_LEN)
    prompt = checkpoint.prompt.tensor
    found = answer_nll(model, prompt, Batch.of(examples, torch.device("cpu")), shared=False).mean().item()
    assert found == pytest.approx(report.best_validation_loss, abs=1e-4)
    start = build(setup_of(model, recipe)).prompt()
    assert can_share(model, start, examples) == (architecture != "gemma2"), "which caps its logits"
    text = TOKENIZER("is it good", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[text[i % len(text)] for i in range(5)]])
    with torch.no_grad():
        row = torch.tensor([examples[0].ids])
        real = model(input_ids=torch.cat([ids, row], dim=1)).logits[0, 5:].log_softmax(dim=-1)
    places = range(examples[0].start, len(examples[0].ids))
    wanted = -sum(real[i - 1, examples[0].ids[i]].item() for i in places) / len(places)
    assert losses(model, start, VALIDATION[:1]) == pytest.approx([wanted], abs=1e-4), "it begins as the text itself"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora"}, "method must be one of prompt_tuning, .* not 'lora'"),
        ({"init": "words"}, "init must be one of None, text, labels, vocabulary, prompt, not 'words'"),
        ({"init": "text"}, 'init "text" needs an init_text'),
        ({"init": "labels", "init_text": "x"}, "init_text is for init text, not for labels"),
        ({"method": "p_tuning", "residual": True}, "residual is for prompt_tuning and prefix_tuning, not for p_tuning"),
        ({"residual": 1}, "residual must be one of False, True, not 1"),
        ({"method": "cpt", "init": "labels"}, "cpt starts from a text and training rows"),
        ({"method": "cartridge", "num_frozen_tokens": 20}, r"num_frozen_tokens \(20\) must be less than"),
        ({"encoder": "gru"}, "encoder must be one of mlp, lstm, not 'gru'"),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size must be an integer from 1 to 8192, not 0"),
        ({"num_ranks": 65}, "num_ranks must be an integer from 1 to 64, not 65"),
        ({"cpt_epsilon": 0}, "cpt_epsilon must be a number from 1e-06 to 1000.0, not 0"),
        ({"learning_rate": "fast"}, "learning_rate must be a number from 1e-08 to 10.0, not 'fast'"),
        ({"budget_seconds": 0.5}, "budget_seconds must be a number from 1.0 to"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRecipe, match=message):
        Recipe(**changes)


@pytest.mark.parametrize(
    ("variant", "changes", "initial", "message"),
    [
        ("prompt_tuning", {"init": "prompt"}, None, "needs a prompt to start from"),
        ("prompt_tuning", {"init": "labels"}, torch.zeros(5, 32), "init is labels, and there is a prompt"),
        ("prompt_tuning", {}, torch.zeros(4, 32), r"has shape \[4, 32\] but must have \[5, 32\]"),
        ("p_tuning", {}, torch.zeros(3, 2, 2, 5, 8), "p_tuning cannot start from keys and values"),
        ("prefix_tuning", {}, torch.zeros(3, 2, 2, 4, 8), "but must have"),
        ("cpt", {}, torch.zeros(40, 32), "cpt starts from a text and training rows, not from a prompt"),
        ("cpt", {"num_virtual_tokens": 2}, None, "no training row fits in 2 virtual tokens"),
    ],
)
def test_bad_starts_are_refused_before_any_work(
    model: Any, tmp_path: Path, variant: str, changes: dict[str, Any], initial: Tensor | None, message: str
) -> None:
    with pytest.raises(InvalidRecipe, match=message):
        run(model, recipe_of(variant, **{"init_text": "", **changes}), tmp_path, initial=initial)
    assert not list(tmp_path.glob("adapter_*"))


def test_every_rate_has_a_default() -> None:
    for method in METHODS:
        recipe = Recipe(method=method)
        assert recipe == Recipe(**recipe.as_dict()) and isinstance(recipe.learning_rate, float)


# --- budget and rates by trial


class Clock:
    """Seconds that pass as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("app.train.loop.time.monotonic", lambda: self.now)
        step, validate = "app.train.loop.Loop._step", "app.train.loop.Loop._validate"
        self.costs = {step: 1.0, validate: 2.0}
        for path in (step, validate):
            monkeypatch.setattr(path, self._slow(path, _resolve(path)))

    def _slow(self, path: str, function: Any) -> Any:
        def slow(*arguments: Any) -> Any:
            self.now += self.costs[path]
            return function(*arguments)

        return slow


def _resolve(path: str) -> Any:
    from app.train.loop import Loop

    return getattr(Loop, path.rpartition(".")[2])


def test_a_budget_sets_the_steps_and_the_cosine_ends_within_it(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    recipe = recipe_of("prompt_tuning", max_steps=1_000, budget_seconds=30.0, eval_every=8, patience=99)
    seen: list[Progress] = []
    report = run(model, recipe, tmp_path, on_progress=seen.append)
    assert report.stopped == "budget" and 26 <= report.seconds <= 30
    assert 18 <= report.steps <= 24 and seen[-1].max_steps == report.steps
    assert seen[0].seconds == 2.0 + 1.0, "the start is validated, and a step is made"
    assert seen[0].max_steps == 1_000 and seen[5].max_steps < 30
    assert seen[-1].learning_rate < 0.02 * max(progress.learning_rate for progress in seen)

    # a machine that gets slower: fewer steps, and the rate still comes down
    clock.costs = {path: cost / 2 for path, cost in clock.costs.items()}

    def slower(progress: Progress) -> None:
        seen.append(progress)
        if progress.step == 16:
            clock.costs = {path: cost * 2 for path, cost in clock.costs.items()}

    seen.clear()
    report = run(model, recipe, tmp_path / "slower", on_progress=slower)
    assert report.stopped == "budget" and 26 <= report.seconds <= 33
    assert seen[-1].learning_rate < 0.2 * max(progress.learning_rate for progress in seen)

    assert run(model, replace(recipe, max_steps=9), tmp_path / "few").stopped == "max_steps"


def test_a_budget_that_validation_uses_up_still_makes_a_step(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a start that nothing was learnt from would be published as trained."""
    clock = Clock(monkeypatch)
    clock.costs["app.train.loop.Loop._validate"] = 40.0
    report = run(model, recipe_of("prompt_tuning", max_steps=1_000, budget_seconds=30.0, eval_every=8), tmp_path)
    assert report.stopped == "budget" and report.steps == report.best_step == 1
    assert [point["step"] for point in report.curve] == [0, 1]


def test_a_budget_survives_a_resume(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    recipe = recipe_of("prompt_tuning", max_steps=1_000, budget_seconds=30.0, eval_every=8, patience=99)
    whole = run(model, recipe, tmp_path / "whole")

    def end(progress: Progress) -> None:
        if progress.step in (7, 13):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(model, recipe, tmp_path / "parts", on_progress=end)
    assert run(model, recipe, tmp_path / "parts", on_progress=end).as_dict() == whole.as_dict()


def test_plans_and_rates() -> None:
    recipe = Recipe(max_steps=100, budget_seconds=50.0, learning_rate=1.0, warmup_steps=15)
    assert next_plan(recipe, 10, 20.0) == 24 and next_plan(recipe, 10, 60.0) == 10 and next_plan(recipe, 10, 1.0) == 100
    assert next_plan(recipe, 10, 22.0, 2.0) == 23, "two seconds a step"
    assert learning_rate(recipe, 19, 20) < 0.02 and learning_rate(recipe, 4, 20) == 1.0
    assert learning_rate(recipe, 14, 100) == 15 / 16


def test_rates_are_tried_from_the_same_start_and_the_best_wins(model: Any, tmp_path: Path) -> None:
    recipe = recipe_of("prompt_tuning", learning_rate="auto", max_steps=15, warmup_steps=1)
    steps: list[int] = []
    report = run(model, recipe, tmp_path / "whole", on_progress=lambda progress: steps.append(progress.step))
    assert [trial["learning_rate"] for trial in report.trials] == pytest.approx([0.06, 0.2, 0.6])
    best = min(report.trials, key=lambda trial: trial["validation_loss"])
    assert report.recipe["learning_rate"] == best["learning_rate"]
    assert steps == [0] * 15 + list(range(1, 16))
    for number, trial in enumerate(report.trials):
        rate = trial["learning_rate"]
        alone = replace(recipe, learning_rate=rate, max_steps=5, warmup_steps=1, eval_every=5)
        last = run(model, alone, tmp_path / f"alone-{number}").curve[-1]
        assert last["step"] == 5 and last["validation_loss"] == trial["validation_loss"]

    # killed in the second trial, and again after all of them
    calls = 0

    def end(_: Progress) -> None:
        nonlocal calls
        calls += 1
        if calls in (8, 19):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(model, recipe, tmp_path / "parts", on_progress=end)
    found = run(model, recipe, tmp_path / "parts", on_progress=end).as_dict()
    for told in (found, whole := report.as_dict()):
        told["trials"] = [{**trial, "seconds": 0} for trial in told["trials"]]
        told["seconds"] = 0
    assert found == whole
    assert calls == 15 + 15 and {p.name for p in (tmp_path / "parts").iterdir()} == {
        CONFIG_FILE,
        TENSORS_FILE,
        "report.json",
    }


def test_a_rate_that_blows_up_loses(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.train.loop import Loop

    step = Loop._step

    def blow_up(loop: Any, examples: Any, rate: float, number: int) -> float:
        if loop.recipe.learning_rate != 0.06:
            raise TrainingFailed("the loss is not finite")
        return step(loop, examples, rate, number)

    monkeypatch.setattr(Loop, "_step", blow_up)
    recipe = recipe_of("prompt_tuning", learning_rate="auto")
    report = run(model, recipe, tmp_path)
    assert report.recipe["learning_rate"] == 0.06 and len(report.trials) == 1
    monkeypatch.setattr(Loop, "_step", lambda *_: blow_up(type("L", (), {"recipe": Recipe()}), None, 0.0, 0))
    with pytest.raises(TrainingFailed, match="no learning rate that was tried"):
        run(model, recipe, tmp_path / "none")


def test_a_trial_that_blows_up_has_taken_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("app.train.sweep.time.monotonic", lambda: now)
    recipe = recipe_of("prompt_tuning", learning_rate="auto", budget_seconds=100.0)

    def trial(_: Recipe, folder: Path) -> Any:
        nonlocal now
        now += 8.0
        if folder.name != "0":
            raise TrainingFailed("the loss is not finite")
        return SimpleNamespace(best_validation_loss=1.0, seconds=7.5)

    assert sweep(recipe, tmp_path, trial)[0].budget_seconds == 100 - 7.5 - 2 * 8
