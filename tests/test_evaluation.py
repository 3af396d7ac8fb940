"""An evaluation: answers to rows, scored, and held against another's."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest

from app.errors import InvalidTrainingData, NumericalError
from app.manifest import Calibration
from app.soft_prompt import SoftPrompt
from app.text import Template
from app.train.data import MAX_REFERENCES, Row, digest, read_rows
from app.train.evaluate import Evaluator
from app.train.evaluation import Evaluation
from app.train.report import MAX_POINTS, thinned
from tests.fake_engine import FakeEngine
from tests.test_metrics import ANSWERS, TARGETS
from tests.tiny import beginning_tokenizer, tiny_tokenizer

LABELS = ["a", "b", "c", "d"]


def rows(targets: str | list[str]) -> list[Row]:
    return [Row(f"input {i}", target, f"rows.jsonl:{i + 1}") for i, target in enumerate(targets)]


def of_labels(answers: str = ANSWERS, targets: str = TARGETS, name: str = "mood:1") -> Evaluation:
    return Evaluation(name=name, rows=rows(targets), answers=list(answers), labels=LABELS)


def of_text(answers: list[str], targets: list[str], name: str = "sum:1") -> Evaluation:
    return Evaluation(name=name, rows=rows(targets), answers=answers)


def test_labels_are_scored_as_scikit_learn_scores_them() -> None:
    found = of_labels()
    assert found.scores == {"accuracy": 0.7, "macro_f1": 0.6235}
    confusion = found.confusion()
    assert confusion is not None and confusion.labels == LABELS
    # confusion_matrix(targets, answers, labels=["a", "b", "c", "d"])
    assert confusion.counts == [[21, 5, 5, 0], [0, 11, 1, 2], [3, 1, 9, 1], [0, 0, 0, 1]]


def test_what_is_no_label_has_one_place_in_the_confusion() -> None:
    found = Evaluation(name="x", rows=rows(["a", "odd", "other"]), answers=["a", "b", "?"], labels=["a", "b"])
    confusion = found.confusion()
    assert confusion is not None and confusion.labels == ["a", "b", None]
    assert confusion.counts == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert of_text(["a"], ["a"]).confusion() is None


def test_text_has_fields_where_every_target_has_them() -> None:
    plain = of_text(["the cat sat down here", "no"], ["the cat sat down here", "yes"])
    assert list(plain.scores) == ["exact_match", "rouge_l", "bleu", "chrf"] and plain.scores["exact_match"] == 0.5
    forms = of_text(["a: 1 | b: 3"], ["a: 1 | b: 2"])
    assert forms.scores["field_f1"] == 0.5 and "field_f1" in forms.intervals()


def test_every_score_lies_in_its_interval_and_that_in_its_range() -> None:
    for found in (of_labels(), of_text(["a b c d e", "x y z", "q"] * 9, ["a b c d e", "x y", "p"] * 9)):
        intervals = found.intervals()
        assert intervals.keys() == found.scores.keys()
        for name, (low, high) in intervals.items():
            most = 100 if name in ("bleu", "chrf") else 1
            assert 0 <= low <= found.scores[name] <= high <= most and low < high, name
    near = [[math.log(p), math.log(1 - p)] for p in (0.9, 0.8, 0.7, 0.6) * 10]
    right = Evaluation(name="x", rows=rows("a" * 40), answers=["a"] * 40, labels=["a", "b"], label_scores=near)
    assert right.intervals()["ece"][0] >= 0.0 and right.intervals()["accuracy"] == (1.0, 1.0)
    spread = judged().intervals()["ece"]
    assert spread[0] == 0.0 and spread[1] <= 1.0, "the basic interval of few rows would go below"
    assert of_labels().intervals(1) != of_labels().intervals(0) == of_labels().intervals(0)


def test_other_references_count_for_bleu_and_chrf_alone() -> None:
    one = Evaluation(name="x", rows=[Row("i", "we left early today")], answers=["they went home soon"])
    more = Evaluation(
        name="x", rows=[Row("i", "we left early today", references=("they went home soon",))], answers=one.answers
    )
    assert more.scores["bleu"] == more.scores["chrf"] == 100.0 and one.scores["chrf"] < 50
    assert more.scores["exact_match"] == one.scores["exact_match"] == 0 and more.scores["rouge_l"] == 0
    assert more.summary()["signatures"]["bleu"].startswith("nrefs:2|")


def test_two_versions_are_compared_row_by_row() -> None:
    targets = "ab" * 50
    good, bad = "ab" * 48 + "bbbb", "ab" * 45 + "aaaaaaaaaa"
    found = of_labels(good, targets).compare(of_labels(bad, targets, "mood:2"))
    assert found["accuracy"].difference == pytest.approx(0.98 - 0.95)
    low, high = found["accuracy"].interval
    assert -0.03 < low < 0.03 < high < 0.09
    assert list(of_labels(good, targets).compare(of_labels(bad, targets), only=("macro_f1",))) == ["macro_f1"]
    same = of_labels(good, targets).compare(of_labels(good, targets))
    assert same["accuracy"].as_dict() == {"difference": 0.0, "interval": (0.0, 0.0)}
    back = of_labels(bad, targets).compare(of_labels(good, targets))
    assert back["accuracy"].interval == pytest.approx((-high, -low)), "the same resamples"


def test_other_rows_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same rows"):
        of_labels("ab", "ab").compare(of_labels("ab", "ba"))
    with pytest.raises(ValueError, match="same rows"):
        of_labels("ab", "ab").compare(of_labels("a", "a"))


def test_a_classifier_is_compared_with_text_as_a_classifier() -> None:
    labels, text = of_labels("aab", "abb"), of_text(["a", "b", "who knows"], ["a", "b", "b"])
    found = labels.compare(text)
    assert set(found) == {"accuracy", "macro_f1"} and found["accuracy"].difference == 0.0
    theirs = text.scored_as(labels)
    assert theirs.scores == {"accuracy": 0.6667, "macro_f1": pytest.approx(0.5556, abs=1e-4)}
    confusion = theirs.confusion()
    assert confusion is not None and confusion.labels == ["a", "b", None] and confusion.counts[1] == [0, 1, 1]
    assert set(text.compare(labels)) >= {"exact_match", "rouge_l", "bleu", "chrf"}


SURE = [[math.log(p), math.log(1 - p)] for p in (0.99, 0.9, 0.6, 0.55, 0.2)]


def judged(temperature: float | None = None) -> Evaluation:
    return Evaluation(
        name="mood:1",
        rows=rows(["b", "a", "b", "a", "b"]),
        answers=["a", "a", "a", "a", "b"],
        labels=["a", "b"],
        label_scores=SURE,
        temperature=temperature,
    )


def test_wrong_answers_come_with_the_surest_first() -> None:
    assert judged().wrong() == [0, 2]
    assert of_text(["x", "a b", "same"], ["a b c", "a b c", "same"]).wrong() == [0, 1], "the least alike first"
    [record] = judged().records([0])
    assert record["row"] == 1 and record["source"] == "rows.jsonl:1" and not record["right"]
    assert record["probabilities"] == pytest.approx({"a": 0.99, "b": 0.01})
    softened = judged(2.0).records([0])[0]["probabilities"]["a"]
    assert softened == pytest.approx(math.sqrt(0.99) / (math.sqrt(0.99) + math.sqrt(0.01))), "as they are served"
    impossible = Evaluation(
        name="x", rows=rows("a"), answers=["a"], labels=["a", "b"], label_scores=[[-math.inf, -math.inf]]
    )
    assert impossible.records([0])[0]["probabilities"] == {"a": 0.5, "b": 0.5} and "ece" not in impossible.scores
    [text] = of_text(["a b"], ["a b c"]).records([0])
    assert text["rouge_l"] == 0.8 and "probabilities" not in text


def test_reliability_is_that_of_the_probabilities_that_are_served() -> None:
    bins = judged().reliability()
    assert [(one.rows, one.confidence, one.accuracy) for one in bins] == [
        (2, 0.575, 0.5),  # 0.55 and 0.6: the bin is (8/15, 9/15]
        (1, 0.8, 1.0),
        (1, 0.9, 1.0),
        (1, 0.99, 0.0),
    ]
    gap = sum(one.rows * abs(one.confidence - one.accuracy) for one in bins) / 5
    assert judged().scores["ece"] == pytest.approx(gap, abs=1e-4)
    warm = judged(2.0)
    assert warm.scores["ece"] == judged().scores["ece"] != warm.scores["ece_calibrated"]
    assert max(one.confidence for one in warm.reliability()) < 0.95


def test_a_summary_is_json() -> None:
    for found in (judged(2.0), of_labels(), of_text(["x: 1"], ["x: 2"])):
        summary = found.summary(7)
        assert json.loads(json.dumps(summary, allow_nan=False)).keys() == summary.keys()
        assert ("confusion" in summary) is (found.labels is not None) is not ("signatures" in summary)


def test_answers_are_those_of_the_engine() -> None:
    """A version's labels are scored and its text generated; probabilities are calibrated, answers never change."""
    tokenizer = tiny_tokenizer()
    engine = FakeEngine(tokenizer(" fine")["input_ids"])
    positive = tokenizer(" b", add_special_tokens=False)["input_ids"]
    engine.logprobs = lambda tokens: [-0.1 if tokens == positive else -2.0] + [0.0] * (len(tokens) - 1)
    seen: list[int] = []

    def evaluator(labels: list[str] | None) -> Evaluator:
        return Evaluator(
            engine=engine,
            tokenizer=tokenizer,
            eos_token_ids=frozenset({0}),
            labels=labels,
            on_row=lambda: seen.append(1),
        )

    async def ask(labels: list[str] | None, prompt: SoftPrompt | None = None) -> Evaluation:
        calibration = Calibration(temperature=2.0)
        return await evaluator(labels).evaluate(
            prompt, Template("{input}:"), rows("ab"), name="mood:1", calibration=calibration
        )

    chosen = asyncio.run(ask(["a", "b"]))
    assert chosen.answers == ["b", "b"] and chosen.temperature == 2.0 and chosen.scores["accuracy"] == 0.5
    assert chosen.label_scores == [[-2.0, -0.1]] * 2 and {"ece", "ece_calibrated"} < chosen.scores.keys()
    written = asyncio.run(ask(None))
    assert written.answers == ["fine", "fine"] and written.labels is None and written.name == "mood:1"
    assert len(seen) == 4


@pytest.mark.parametrize("adds", [True, False])
def test_zero_shot_chats_begin_once(adds: bool) -> None:
    """Whether the tokenizer adds the token that begins a text to what the chat template wrote, or not."""
    tokenizer = beginning_tokenizer(adds=adds)
    engine = FakeEngine(tokenizer(" fine")["input_ids"])
    evaluator = Evaluator(engine=engine, tokenizer=tokenizer, eos_token_ids=frozenset({0}))
    asyncio.run(evaluator.zero_shot("Do it.", Template(None), rows("a"), 0))
    direct = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Do it.\n\ninput 0"}], tokenize=False, add_generation_prompt=True
    )
    asked = [list(call.token_ids) for call in engine.calls]
    assert tokenizer(direct, add_special_tokens=False)["input_ids"] in asked
    assert all(ids[:2] != [0, 0] for ids in asked)


def test_references_are_read_where_they_are_wanted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"input": "i", "target": "t", "references": ["u", "t", "u", "v"]}) + "\n")
    [row] = read_rows(path, references=True)
    assert row.references == ("u", "v"), "each once, and not the target again"
    [plain] = read_rows(path)
    assert plain.references == () and digest([], [plain]) != digest([], [row])
    for bad in ("t", [1], {"a": 1}, None, ["\ud800"], ["x"] * (MAX_REFERENCES + 1)):
        path.write_text(json.dumps({"input": "i", "target": "t", "references": bad}) + "\n")
        assert read_rows(path), "training ignores it"
        with pytest.raises(InvalidTrainingData, match="rows.jsonl:1: 'references'"):
            read_rows(path, references=True)


def test_a_long_curve_is_thinned() -> None:
    curve = [{"step": i, "train_loss": 1 / 3, "validation_loss": 2.0} for i in range(1, 1001)]
    short = thinned(curve)
    assert len(short) == MAX_POINTS and short[0]["step"] == 1 and short[-1]["step"] == 1000
    assert short[0]["train_loss"] == 0.333333 and thinned(curve[:3])[2]["step"] == 3
    assert [point["step"] for point in short] == sorted({point["step"] for point in short})


def test_a_row_that_fails_ends_the_others_and_labels_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, asked, ended = tiny_tokenizer(), 0, 0
    engine = FakeEngine([1])
    encoded: list[str] = []
    template = Template("{input}:")
    monkeypatch.setattr(Template, "target", lambda _, label: encoded.append(label) or f" {label}")

    async def score(*_: object) -> list[list[float]]:
        nonlocal asked, ended
        asked += 1
        if asked == 3:
            raise NumericalError("x")
        try:
            await asyncio.Event().wait()
        finally:
            ended += 1
        raise AssertionError

    async def ask() -> None:
        monkeypatch.setattr(engine, "score", score)
        evaluator = Evaluator(engine=engine, tokenizer=tokenizer, eos_token_ids=frozenset({0}), labels=["a", "b"])
        with pytest.raises(NumericalError):
            await evaluator.evaluate(None, template, rows("abcde"))
        assert len(asyncio.all_tasks()) == 1, "nobody waits for their answers any more"

    asyncio.run(ask())
    assert ended == asked - 1 and encoded == ["a", "b"]
