"""A new version takes an alias over only if it is surely better on the same rows, and the job says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.errors import ContextLengthExceeded, NotReady
from app.jobs.gate import judge
from app.train.data import Row
from app.train.evaluation import Evaluation
from tests.api_harness import Harness
from tests.fake_engine import Call
from tests.jobs_harness import Jobs, fast_jobs

GOOD, BAD = 0.75, 0.25  # contents of prompts, told apart by the engine below


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    fast_jobs(monkeypatch)
    harness = Harness.create(tmp_path / "prompts")
    positive = harness.tokens("positive")

    def logprobs(tokens: list[int]) -> list[float]:
        return [-0.1 if tokens == positive else -1.0] * len(tokens)

    def scale(call: Call) -> float:
        """Behind the good prompt rows with an odd number are positive, behind the bad one those with an even number."""
        assert call.prompt is not None
        odd = int(harness.base.tokenizer.decode(call.token_ids).split()[1]) % 2
        good = float(call.prompt.tensor[0, 0]) == GOOD
        return 1.0 if bool(odd) == good else -1.0

    harness.engine.logprobs, harness.engine.scale = logprobs, scale
    with harness.client() as client:
        yield Jobs(harness, client)


def run(jobs: Jobs, content: float, **tuning: Any) -> dict[str, Any]:
    body = {"type": "prompt_tuning", "prompt_tuning": {"description": f"step content:{content}", **tuning}}
    job = jobs.until(jobs.create(method=body), "succeeded", "failed")
    assert job["status"] == "succeeded", job
    return job


def test_better_moves_it_and_worse_does_not(jobs: Jobs) -> None:
    registry = jobs.harness.registry
    first = run(jobs, BAD)
    assert first["gate"]["moved"] and first["metrics"]["soft_prompt"]["accuracy"] == 0.0
    better = run(jobs, GOOD)
    scores = better["metrics"]["soft_prompt"]
    assert set(scores) == {"accuracy", "macro_f1", "ece"} and scores["accuracy"] == scores["macro_f1"] == 1.0
    gate = better["gate"]
    assert gate["moved"] and (gate["score"], gate["current"], gate["current_score"]) == (1.0, "mood:1", 0.0)
    assert gate["interval"] == [1.0, 1.0] and gate["rows"] == 10 and "better than mood:1" in gate["reason"]
    assert registry.resolve("mood").number == 2
    worse = run(jobs, BAD + 0.125)
    assert not worse["gate"]["moved"] and "worse than mood:2" in worse["gate"]["reason"]
    assert worse["fine_tuned_model"] == "mood:3" and registry.resolve("mood").number == 2
    same = run(jobs, GOOD)
    assert not same["gate"]["moved"] and "same content" in same["gate"]["reason"]
    assert any("was not moved" in message for message in jobs.messages(worse))
    forced = run(jobs, BAD + 0.0625, gate=False)
    assert forced["gate"]["moved"] and registry.resolve("mood").reference == forced["fine_tuned_model"]
    assert jobs.harness.num_pins == 0


def test_a_version_that_cannot_answer_the_rows_keeps_the_alias_and_the_new_one_is_published(jobs: Jobs) -> None:
    run(jobs, BAD)
    score = jobs.harness.engine.score

    async def picky(prompt: Any, token_ids: Any, continuations: Any, **others: Any) -> Any:
        if float(prompt.tensor[0, 0]) == BAD:
            raise ContextLengthExceeded("too long behind that prompt")
        return await score(prompt, token_ids, continuations, **others)

    jobs.harness.engine.score = picky  # type: ignore[method-assign]
    job = run(jobs, GOOD)
    assert job["fine_tuned_model"] == "mood:2" and not job["gate"]["moved"]
    assert job["gate"]["reason"] == "mood:1 cannot be scored: too long behind that prompt"
    assert jobs.harness.num_pins == 0


def test_no_alias_and_canaries(jobs: Jobs) -> None:
    registry = jobs.harness.registry
    job = run(jobs, BAD, alias="")
    assert job["gate"] is None and not registry.task("mood").aliases
    run(jobs, GOOD, alias="latest")
    etag = registry.task("mood").aliases["latest"].etag
    registry.move_alias("mood", "latest", {1: 0.5, 2: 0.5}, expected=etag)
    job = run(jobs, GOOD + 0.125)
    assert not job["gate"]["moved"] and "canary" in job["gate"]["reason"]
    assert registry.task("mood").aliases["latest"].target.is_split


def test_an_alias_that_is_moved_meanwhile_stays_where_it_is(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    run(jobs, BAD)
    registry = jobs.harness.registry
    publish = registry.publish

    def move_first(*args: Any, **options: Any) -> Any:
        registry.move_alias("mood", "latest", {1: 0.5, 2: 0.5}, expected=registry.task("mood").aliases["latest"].etag)
        registry.move_alias("mood", "latest", 2, expected=registry.task("mood").aliases["latest"].etag)
        return publish(*args, **options)

    jobs.harness.publish("mood", 0.0)
    etag = registry.task("mood").aliases["latest"].etag
    registry.move_alias("mood", "latest", 1, expected=etag)
    monkeypatch.setattr(registry, "publish", move_first)
    job = run(jobs, GOOD)
    assert not job["gate"]["moved"] and "moved while" in job["gate"]["reason"]
    assert registry.resolve("mood").number == 2 and job["fine_tuned_model"] == "mood:3"


@pytest.mark.parametrize("was", [None, BAD])
def test_a_crash_behind_the_move_does_not_change_the_verdict(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, was: float | None
) -> None:
    """The alias has moved and no record says so yet."""
    registry, number = jobs.harness.registry, 1
    if was is not None:
        run(jobs, was)
        number = 2
    moves = crash_behind(registry, "move_alias", monkeypatch)
    job = run(jobs, GOOD)
    assert len(moves) == 2 and job["fine_tuned_model"] == f"mood:{number}"
    assert len(registry.task("mood").versions) == number
    gate = job["gate"]
    assert gate["moved"] and registry.resolve("mood").number == number
    if was is None:
        assert gate["reason"] == "the alias is new"
    else:
        assert (gate["current"], gate["current_score"], gate["score"]) == ("mood:1", 0.0, 1.0)
        assert "better than mood:1" in gate["reason"]
    assert any("The alias latest was moved" in message for message in jobs.messages(job))


def test_a_crash_behind_the_move_takes_nobody_s_rollback_back(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    run(jobs, BAD)
    registry = jobs.harness.registry

    def roll_back() -> None:
        registry.roll_back_alias("mood", "latest", expected=registry.task("mood").aliases["latest"].etag)

    crash_behind(registry, "move_alias", monkeypatch, then=roll_back)
    job = run(jobs, GOOD)
    assert not job["gate"]["moved"] and "moved while" in job["gate"]["reason"]
    assert registry.resolve("mood").number == 1 and job["fine_tuned_model"] == "mood:2"


def test_a_crash_before_the_version_is_there_judges_again(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    run(jobs, BAD)
    registry = jobs.harness.registry
    publish, calls = registry.publish, []

    def fail_first(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            jobs.harness.publish("mood", BAD + 0.125)
            raise NotReady("the disk has gone")
        return publish(*args, **options)

    monkeypatch.setattr(registry, "publish", fail_first)
    job = run(jobs, GOOD)
    assert job["gate"]["moved"] and job["gate"]["current"] == "mood:2" and registry.resolve("mood").number == 3


def crash_behind(
    registry: Any, name: str, monkeypatch: pytest.MonkeyPatch, then: Callable[[], None] = lambda: None
) -> list[int]:
    """Behind the first call of a method, which is done; returns a list that grows with the calls."""
    method, calls = getattr(registry, name), list[int]()

    def crashing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        found = method(*args, **options)
        if len(calls) == 1:
            then()
            raise NotReady("the server has died")
        return found

    monkeypatch.setattr(registry, name, crashing)
    return calls


def test_a_version_that_cannot_be_scored_keeps_its_alias(jobs: Jobs) -> None:
    run(jobs, BAD)
    jobs.harness.registry._forget(jobs.harness.registry.resolve("mood"))
    path = jobs.harness.settings.registry / "mood/versions/1/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    job = run(jobs, GOOD)
    assert not job["gate"]["moved"] and job["gate"]["reason"].startswith("mood:1 cannot be scored")


def answered(name: str, answers: list[str], target: str, labels: list[str] | None = None) -> Evaluation:
    rows = [Row(f"row {i}", target) for i in range(len(answers))]
    return Evaluation(name=name, rows=rows, answers=answers, labels=labels)


def test_an_interval_that_holds_zero_is_not_enough() -> None:
    labels = ["a", "b"]
    new = answered("t:2", ["a"] * 20, "a", labels)
    one_better = judge("latest", new, answered("t:1", ["a"] * 19 + ["b"], "a", labels), seed=0)
    assert not one_better.moved and one_better.score == 1.0 and one_better.current_score == 0.95
    assert "not surely better" in one_better.reason
    assert one_better.current == "t:1" and one_better.metric == "accuracy" and one_better.rows == 20
    half_better = judge("latest", new, answered("t:1", ["a"] * 10 + ["b"] * 10, "a", labels), seed=0)
    assert half_better.moved and half_better.interval is not None and half_better.interval[0] > 0
    few_better = judge("latest", new, answered("t:1", ["a"] * 16 + ["b"] * 4, "a", labels), seed=0)
    assert few_better.interval is not None and few_better.interval[0] > 0 and not few_better.moved, "1 in 16"
    assert "better in 4 rows and worse in 0" in few_better.reason
    six_better = judge("latest", new, answered("t:1", ["a"] * 14 + ["b"] * 6, "a", labels), seed=0)
    assert six_better.moved
    none_better = judge("latest", new, answered("t:1", ["a"] * 20, "a", labels), seed=0)
    assert not none_better.moved and none_better.interval == (0.0, 0.0)
    text = judge("latest", answered("t:2", ["a b c d"], "a b c d"), answered("t:1", ["a b x y"], "a b c d"), seed=0)
    assert text.metric == "rouge_l" and (text.score, text.current_score) == (1.0, 0.5)
    worded = judge("latest", new, answered("t:1", ["b"] * 20, "a"), seed=0)
    assert worded.moved and (worded.metric, worded.current_score) == ("accuracy", 0.0), "it generated what was a label"


def test_a_row_of_text_is_better_by_its_score() -> None:
    """And not only where it is right: 4 rows nearer to the target are not enough, 6 are."""
    near, far = "a b c x", "a b x y"
    for better, moved in ((4, False), (6, True)):
        new = answered("t:2", [near] * better + [far] * (20 - better), "a b c d")
        found = judge("latest", new, answered("t:1", [far] * 20, "a b c d"), seed=0)
        assert found.interval is not None and found.interval[0] > 0 and found.moved is moved
    # A mean that a third of the rows lifts while the others fall is not enough either.
    new, current = ["a b c d"] * 20 + [far] * 40, ["x"] * 20 + [near] * 40
    mixed = judge("latest", answered("t:2", new, "a b c d"), answered("t:1", current, "a b c d"), seed=0)
    assert mixed.interval is not None and mixed.interval[0] > 0 and not mixed.moved
    assert "better in 20 rows and worse in 40" in mixed.reason
