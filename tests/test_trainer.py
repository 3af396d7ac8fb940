"""Training on a tiny random Llama: right losses, strict data, and resuming to the same result."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from app.errors import InvalidRecipe, InvalidTrainingData, TrainingFailed
from app.text import Template
from app.train import Progress, Recipe, Row, TrainReport, hold_out, read_rows
from app.train.checkpoint import load_checkpoint
from app.train.data import batches, count_shared, digest, encode
from app.train.forward import Batch, answer_nll, can_share
from app.train.loop import Loop
from app.train.schedule import learning_rate
from app.train.trainer import train

COLOURS = ["red", "green", "blue", "white", "black"]
WORDS = ["<eos>", "<unk>", *COLOURS, "warm", "cold", "a", "the", "very", "wall", ":", "colour", "is"]
TEMPLATE = Template("{input} :")
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ROWS = [
    Row(f"{before} {colour} wall", "warm" if colour in ("red", "white") else "cold")
    for colour in COLOURS
    for before in ("a", "the", "a very", "the very", "the very very")
]
TRAIN, VALIDATION = hold_out(ROWS)
RECIPE = Recipe(
    num_virtual_tokens=4,
    init_text="colour is",
    learning_rate=0.1,
    batch_size=4,
    max_steps=13,
    warmup_steps=2,
    eval_every=4,
    checkpoint_every=3,
    precision="float32",  # on any machine
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, **changes: Any) -> TrainReport:
    options = {
        "rows_train": TRAIN,
        "rows_validation": VALIDATION,
        "template": TEMPLATE,
        "recipe": RECIPE,
        "base_name": "tiny/llama",
        **changes,
    }
    return train(model, tokenizer, out_dir=out, **options)


def stop_after(step: int) -> Any:
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    return on_progress


# --- the loop


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own loading
def test_training_learns_and_publishes_what_peft_reads(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    seen: list[Progress] = []
    recipe = Recipe(**{**RECIPE.as_dict(), "max_steps": 60, "learning_rate": 0.3})
    report = run(llama, tokenizer, tmp_path, recipe=recipe, on_progress=seen.append)

    losses = [point["validation_loss"] for point in report.curve]
    assert report.best_validation_loss == min(losses) < 0.7 * losses[0]
    assert [point["step"] for point in report.curve] == [*range(0, 60, 4), 60]
    assert "train_loss" not in report.curve[0] and all("train_loss" in point for point in report.curve[1:])
    assert report.warnings == []
    assert [progress.step for progress in seen] == list(range(1, report.steps + 1))
    assert not any(p.requires_grad for p in llama.parameters())
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())

    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "report.json",
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "PROMPT_TUNING"
    assert config["base_model_name_or_path"] == "tiny/llama"
    assert str(tmp_path) not in json.dumps(config)
    assert json.loads(json.dumps(report.as_dict()))["data_digest"] == digest(TRAIN, VALIDATION)

    # the best prompt, not the last, and PEFT's own loss at batch 1 agrees with ours
    examples = encode(VALIDATION, tokenizer, TEMPLATE, 64)
    peft = PeftModel.from_pretrained(llama, str(tmp_path))
    total, count = 0.0, 0
    for example in examples:
        labels = [-100] * example.start + list(example.ids[example.start :])
        loss = peft(input_ids=torch.tensor([example.ids]), labels=torch.tensor([labels])).loss
        answers = len(example.ids) - example.start
        total, count = total + loss.item() * answers, count + answers
    assert total / count == pytest.approx(report.best_validation_loss, rel=1e-5)


@pytest.mark.parametrize("average_steps", [1, 3, 100])
def test_what_is_kept_is_a_mean_over_late_steps(
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    average_steps: int,
) -> None:
    prompts: list[torch.Tensor] = []
    clip = Loop._clip

    def spy(self: Loop) -> torch.Tensor:
        if self.optimizer.state:  # not before the first step
            prompts.append(self.method.prompt().detach().clone())
        return clip(self)

    monkeypatch.setattr(Loop, "_clip", spy)
    changes = {"max_steps": 15, "eval_every": 14, "average_steps": average_steps, "patience": 1}
    losses = iter([3.0, 2.0, 2.5])
    monkeypatch.setattr(Loop, "_validate", lambda _, __: next(losses))
    report = run(llama, tokenizer, tmp_path, recipe=Recipe(**{**RECIPE.as_dict(), **changes}))
    assert (report.best_step, len(prompts)) == (14, 14)
    shares = [max(1 / average_steps, min(1.0, 9 / (step + 8))) for step in range(1, 15)]
    weights = [share * math.prod(1 - later for later in shares[i + 1 :]) for i, share in enumerate(shares)]
    assert sum(weights) == pytest.approx(1) and weights[-1] >= 1 / average_steps
    mean = sum(weight * prompt.double() for weight, prompt in zip(weights, prompts, strict=True))
    kept = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.allclose(kept.double(), torch.as_tensor(mean), atol=1e-6)
    assert torch.equal(kept, prompts[-1]) is (average_steps == 1)


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("step", [2, 3, 4, 11])
def test_a_run_that_ended_early_resumes_to_the_same_result(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, step: int, how: str
) -> None:
    whole = run(llama, tokenizer, tmp_path / "whole")
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:

        def end(progress: Progress) -> None:
            if how == "killed" and progress.step == step:  # then nothing is written any more
                patch.setattr("app.train.loop.save_checkpoint", lambda *_: None)
            stop_after(step)(progress)

        run(llama, tokenizer, parts, on_progress=end)
    (parts / "checkpoint" / "state.safetensors.new").write_bytes(b"half a fi")  # killed in a write
    steps: list[int] = []
    resumed = run(llama, tokenizer, parts, on_progress=lambda p: steps.append(p.step))

    saved = step if how == "stopped" else max(s for s in (0, 3, 4, 6, 8, 9, 12) if s <= step)
    assert steps == list(range(saved + 1, RECIPE.max_steps + 1))
    first, second = whole.as_dict(), resumed.as_dict()
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    name = "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (parts / name).read_bytes()


def test_a_finished_run_is_not_done_twice(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    report = run(llama, tokenizer, tmp_path)
    steps: list[int] = []
    assert run(llama, tokenizer, tmp_path, on_progress=lambda p: steps.append(p.step)) == report
    assert steps == []
    (tmp_path / "report.json").write_text("{half a re")
    run(llama, tokenizer, tmp_path, on_progress=lambda p: steps.append(p.step))
    assert len(steps) == RECIPE.max_steps


@pytest.mark.parametrize("change", ["recipe", "template", "data", "resume", "broken"])
def test_another_runs_checkpoint_is_not_continued(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, change: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(llama, tokenizer, tmp_path, on_progress=stop_after(5))
    if change == "broken":
        state = tmp_path / "checkpoint" / "state.safetensors"
        state.write_bytes(state.read_bytes()[:-7])
    changes: dict[str, Any] = {
        "recipe": {"recipe": Recipe(**{**RECIPE.as_dict(), "seed": 9})},
        "template": {"template": Template("{input} is")},
        "data": {"rows_train": TRAIN[1:]},
        "resume": {"resume": False},
        "broken": {},
    }[change]
    steps: list[int] = []
    run(llama, tokenizer, tmp_path, on_progress=lambda p: steps.append(p.step), **changes)
    assert steps[0] == 1


def test_training_stops_when_validation_no_longer_improves(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    recipe = Recipe(**{**RECIPE.as_dict(), "learning_rate": 5.0, "eval_every": 1, "patience": 3, "max_steps": 99})
    report = run(llama, tokenizer, tmp_path, recipe=recipe)
    assert report.stopped == "no improvement"
    assert report.steps == report.best_step + 3


def test_a_start_that_no_step_is_better_than_is_kept(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    run(llama, tokenizer, tmp_path / "first", recipe=Recipe(**{**RECIPE.as_dict(), "max_steps": 60}))
    name = "adapter_model.safetensors"
    start = load_file(tmp_path / "first" / name)["prompt_embeddings"]
    recipe = Recipe(**{**RECIPE.as_dict(), "init_text": "", "init": "prompt", "learning_rate": 10.0})
    # a tensor that numpy cannot have as it is, as one on a GPU
    given = torch.nn.Parameter(start.clone())
    report = run(llama, tokenizer, tmp_path / "second", recipe=recipe, initial=given)
    losses = [point["validation_loss"] for point in report.curve]
    assert report.best_step == 0 and report.steps == RECIPE.max_steps
    assert report.best_validation_loss == losses[0] == min(losses) < min(losses[1:])
    assert torch.equal(load_file(tmp_path / "second" / name)["prompt_embeddings"], start)
    assert report.warnings == ["the start was kept: no step was better on the validation rows"]


def test_a_loss_that_is_not_finite_publishes_nothing(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    weight = llama.get_decoder().norm.weight

    def spoil(_: Progress) -> None:
        with torch.no_grad():
            weight.fill_(math.nan)

    with pytest.raises(TrainingFailed, match="not finite at step 2"):
        run(llama, tokenizer, tmp_path, on_progress=spoil)
    with pytest.raises(TrainingFailed, match="validation loss is nan"):
        run(llama, tokenizer, tmp_path, resume=False)
    assert not list(tmp_path.glob("adapter_*"))


def test_rows_shared_with_validation_are_reported(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    recipe = Recipe(**{**RECIPE.as_dict(), "max_steps": 3})
    report = run(llama, tokenizer, tmp_path, recipe=recipe, rows_validation=TRAIN[:2])
    assert count_shared(TRAIN, TRAIN[:2]) == 2
    assert report.warnings == ["2 validation rows have an input that is also trained on"]


def test_without_validation_rows_some_are_held_out(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    recipe = Recipe(**{**RECIPE.as_dict(), "max_steps": 3, "init_text": ""})
    report = run(llama, tokenizer, tmp_path, recipe=recipe, rows_train=ROWS, rows_validation=[])
    assert (report.train_rows, report.validation_rows) == (22, 3)
    with pytest.raises(InvalidTrainingData, match="at least 2 inputs"):
        run(llama, tokenizer, tmp_path, rows_train=ROWS[:1], rows_validation=[])
    with pytest.raises(InvalidTrainingData, match="no training rows"):
        run(llama, tokenizer, tmp_path, rows_train=[])


def test_the_prompt_begins_as_the_init_text_repeated(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    recipe = Recipe(**{**RECIPE.as_dict(), "max_steps": 3, "learning_rate": 1e-8})
    run(llama, tokenizer, tmp_path, recipe=recipe)
    prompt = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    ids = [WORDS.index(word) for word in ("colour", "is", "colour", "is")]
    torch.testing.assert_close(prompt, llama.get_input_embeddings().weight[ids], atol=1e-6, rtol=0)


# --- the loss


def test_padded_rows_and_the_shared_prompt_change_no_loss_and_no_gradient(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    llama.requires_grad_(False)
    examples = encode(ROWS[:5], tokenizer, TEMPLATE, 64)
    batch = Batch.of(examples, torch.device("cpu"))
    assert not batch.mask.all()
    results = []
    for shared in (True, False):
        prompt = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        losses = answer_nll(llama, prompt, batch, shared=shared)
        losses.sum().backward()
        results.append((losses.detach(), prompt.grad))
    one_by_one = torch.cat(
        [answer_nll(llama, prompt, Batch.of([e], torch.device("cpu")), shared=False).detach() for e in examples]
    )
    torch.testing.assert_close(results[0][0], one_by_one, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    assert can_share(llama, prompt, examples)


def test_a_model_that_caps_its_logits_takes_the_full_forward(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=8, final_logit_softcapping=1.0)).eval()
    examples = encode(VALIDATION, tokenizer, TEMPLATE, 64)
    assert not can_share(gemma, torch.randn(4, 32), examples)
    report = run(gemma, tokenizer, tmp_path)
    assert report.steps == RECIPE.max_steps


# --- recipe and data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be an integer from 1 to 1024, not 0"),
        ({"batch_size": True}, "batch_size must be an integer"),
        ({"learning_rate": math.nan}, "learning_rate must be a number .* not nan"),
        ({"learning_rate": 11}, "learning_rate must be a number from 1e-08 to 10.0, not 11"),
        ({"max_steps": 10, "warmup_steps": 10}, r"warmup_steps \(10\) must be less than"),
        ({"init_text": None}, "init_text must be text"),
    ],
)
def test_a_bad_recipe_names_field_value_and_limit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRecipe, match=message):
        Recipe(**changes)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    recipe = Recipe(learning_rate=1.0, warmup_steps=4, max_steps=14)
    rates = [learning_rate(recipe, step) for step in range(15)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[9] == pytest.approx(0.5)
    assert rates[14] == pytest.approx(0.0)


def test_virtual_tokens_must_fit_the_models_context(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRecipe, match="num_virtual_tokens must be below .* not 63"):
        run(llama, tokenizer, tmp_path, recipe=Recipe(num_virtual_tokens=63))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"input": "a"', "not JSON"),
        (b'["a", "b"]', "not a JSON object"),
        (b'{"input": "a"}', "no 'target' member"),
        (b'{"input": 1, "target": "b"}', "'input' is not a string"),
        (b'{"input": "a", "target": " "}', "'target' is empty"),
        (b'{"input": "a", "target": "b", "target": "c"}', "a member appears twice"),
        (b'{"input": "a", "target": "\\ud800"}', "'target' holds a lone surrogate"),
        (b'{"input": "\xff", "target": "b"}', "not UTF-8 at byte 11"),
        (b"[" * 100_000, "JSON nested too deeply"),
        (b"1" * 5_000, "integer"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"input": "a", "target": "b"}\n\n' + line + b"\n")
    with pytest.raises(InvalidTrainingData, match=rf"^rows.jsonl:3: .*{message}"):
        read_rows(path)


def test_files_have_limits(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "é", "target": "b"}\n' * 3, encoding="utf-8-sig")
    assert read_rows(path) == [Row("é", "b")] * 3
    with pytest.raises(InvalidTrainingData, match=r"rows.jsonl:3: more than 2 rows"):
        read_rows(path, max_rows=2)
    with pytest.raises(InvalidTrainingData, match="larger than 20 bytes"):
        read_rows(path, max_bytes=20)
    with pytest.raises(InvalidTrainingData, match="absent.jsonl: cannot be read"):
        read_rows(tmp_path / "absent.jsonl")
    path.write_text("\n")
    with pytest.raises(InvalidTrainingData, match="no rows"):
        read_rows(path)


def test_rows_are_encoded_as_they_will_be_served(tokenizer: PreTrainedTokenizerBase) -> None:
    [example] = encode([Row("the wall", "cold")], tokenizer, TEMPLATE, 6)
    assert example.ids == tuple(map(WORDS.index, ("the", "wall", ":", "cold", "<eos>")))
    assert example.start == 3
    with pytest.raises(InvalidTrainingData, match="rows.jsonl:7: 5 tokens, at most 4"):
        encode([Row("the wall", "cold", "rows.jsonl:7")], tokenizer, TEMPLATE, 4)
    with pytest.raises(InvalidTrainingData, match="row 1: the template leaves an empty prompt"):
        encode([Row("", "cold")], tokenizer, Template("{input}"), 4)


def test_an_epoch_holds_every_row_once_with_like_lengths_together() -> None:
    lengths = [n % 37 for n in range(1000)]
    epoch = batches(lengths, 8, seed=1, epoch=0)
    assert sorted(i for batch in epoch for i in batch) == list(range(1000))
    assert epoch == batches(lengths, 8, seed=1, epoch=0)
    assert epoch != batches(lengths, 8, seed=1, epoch=1)
    padding = sum(max(lengths[i] for i in batch) * len(batch) for batch in epoch) - sum(lengths)
    assert padding < 0.2 * sum(lengths)


def test_the_digest_is_of_the_rows_and_their_order() -> None:
    assert digest(TRAIN, VALIDATION) == digest([Row(r.input, r.target) for r in TRAIN], VALIDATION)
    assert digest(TRAIN, VALIDATION) != digest(TRAIN[::-1], VALIDATION)
    assert digest(TRAIN, VALIDATION) != digest([*TRAIN, *VALIDATION], [])
    alike = [
        Row("a", "b"),
        Row("a", "b", references=("c",)),
        Row("a", "b", task="c"),
        Row("a", "b", references=("c", "d")),
        Row("a", "b", references=("c",), task="d"),
        Row("a", "b", task="['c']"),
    ]
    assert len({digest([], [row]) for row in alike}) == len(alike)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(tmp_path, "identity") is None
