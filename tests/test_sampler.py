"""What the sampler chooses, and that no row knows of another. Oracle: transformers' logits processors."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from app.engine import Logprob, SamplingParams
from app.engine.distribution import crossing, ranked, tree
from app.engine.host_cache import HostCache
from app.engine.logits import process
from app.engine.model_runner import ModelRunner, StepOutput, _sampling_row
from app.engine.sampler import Sampled, SamplingRow, sample, target_logprobs, token_logprobs
from app.engine.scheduler import Row
from app.engine.sequence import ContextSequence, ContinuationSequence, GenerationSequence, Score, Sequence
from app.errors import EngineFailed, InvalidRequest, NumericalError

VOCAB = 50
NEVER = float("-inf")


class Allowing:
    """A constraint that allows the same tokens for ever."""

    def __init__(self, *allowed: int, vocab_size: int = VOCAB) -> None:
        bits = torch.zeros(-(-vocab_size // 32) * 32, dtype=torch.int64)
        bits[list(allowed)] = 1
        words = (bits.view(-1, 32) << torch.arange(32)).sum(-1)
        self.words = torch.where(words >= 2**31, words - 2**32, words).int()

    def mask(self) -> torch.Tensor:
        return self.words

    def accept(self, token_id: int) -> bool:
        raise AssertionError(f"the sampler must not advance the constraint ({token_id})")


class Broken(Allowing):
    def __init__(self, result: Any) -> None:
        self.result = result

    def mask(self) -> torch.Tensor:
        if isinstance(self.result, Exception):
            raise self.result
        found: torch.Tensor = self.result
        return found


def row(
    u: float = 0.5,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    constraint: Any = None,
    **params: Any,
) -> SamplingRow:
    before = prompt or []
    chosen = SamplingParams(**{"max_tokens": 99} | params)
    return SamplingRow(chosen, u, [*before, *(output or [])], len(before), constraint)


def ids(results: list[Sampled | Exception]) -> list[int]:
    assert all(isinstance(result, Sampled) for result in results), results
    return [result.id for result in results if isinstance(result, Sampled)]


def draw(logits: torch.Tensor, count: int, **kwargs: Any) -> list[int]:
    """Many draws of one row, in one call."""
    rng = random.Random(0)
    return ids(sample(logits.expand(count, -1), [row(rng.random(), **kwargs) for _ in range(count)]))


def greedy(logits: torch.Tensor, **kwargs: Any) -> int:
    return ids(sample(logits[None], [row(temperature=0, **kwargs)]))[0]


def logits(seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))


def test_greedy_takes_the_largest_logit() -> None:
    rows = torch.stack([logits(i) for i in range(8)])
    assert ids(sample(rows, [row(0.9, temperature=0)] * 8)) == rows.argmax(-1).tolist()


@pytest.mark.parametrize("top_k", [VOCAB, VOCAB + 1, 2**31 - 1])
def test_top_k_of_the_whole_vocabulary_is_off(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = draw(logits(), 200)
    monkeypatch.setattr("app.engine.sampler.ranked", None)  # no sort
    assert draw(logits(), 200, top_k=top_k) == plain


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_softmax(temperature: float) -> None:
    count = 20_000
    found = torch.bincount(torch.tensor(draw(logits(), count, temperature=temperature)), minlength=VOCAB) / count
    expected = torch.softmax(logits() / temperature, -1)
    # 5 standard deviations of a binomial share, for every token
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


@pytest.mark.parametrize("top_k", [1, 3, 49])
def test_top_k_keeps_exactly_the_k_best(top_k: int) -> None:
    allowed = set(logits().topk(top_k).indices.tolist())
    assert set(draw(logits(), 5_000, temperature=5.0, top_k=top_k)) == allowed


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float) -> None:
    probabilities, order = torch.softmax(logits(), -1).sort(descending=True)
    size = int((probabilities.cumsum(-1) < top_p).sum()) + 1
    assert set(draw(logits(), 5_000, top_p=top_p)) <= set(order[:size].tolist())
    frequent = {int(i) for i, p in zip(order[:size], probabilities, strict=False) if p > 0.005}
    assert frequent <= set(draw(logits(), 5_000, top_p=top_p))


def test_top_p_that_is_reached_exactly_takes_no_further_token() -> None:
    halves = torch.tensor([0.25, 0.5, 0.125, 0.125]).log2() * torch.tensor(2.0, dtype=torch.float64).log().float()
    assert set(draw(torch.tensor([0.0, 0.0]), 200, top_p=0.5)) == {0}  # exact in binary
    assert set(draw(halves, 2_000, top_p=0.76)) == {0, 1, 2}


def test_top_k_comes_before_top_p() -> None:
    distribution = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Within the two best the first has 0.57 of the mass, so p = 0.55 leaves it alone; over all four it has 0.4.
    assert set(draw(distribution, 2_000, top_k=2, top_p=0.55)) == {0}
    assert set(draw(distribution, 2_000, top_p=0.55)) == {0, 1}


def test_min_p_is_relative_to_the_best_token_that_may_be_chosen() -> None:
    distribution = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draw(distribution, 2_000, min_p=0.4)) == {0, 1}
    # The best token is forbidden: 0.15 is half of 0.3, and 0.05 a sixth of it.
    assert set(draw(distribution, 2_000, min_p=0.4, stop_token_ids=frozenset({0}), min_tokens=1)) == {1, 2}
    assert set(draw(torch.tensor([1.0, 2.0, 2.0]), 200, min_p=1.0)) == {1, 2}


@pytest.mark.parametrize("vocab_size", [50, 777, 5000])
@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0], ids=["flat", "even", "peaked"])
def test_the_kept_tokens_are_transformers(vocab_size: int, scale: float) -> None:
    """Draws spread over [0, 1) hit every kept token that has a share, and never another one."""
    rng = random.Random(f"{vocab_size} {scale}")
    for case in range(8):
        temperature, top_k = rng.choice([0.5, 1.0, 1.7]), rng.choice([0, 0, 1, 5, 40, 300, 6000])
        top_p, min_p = rng.choice([1.0, 0.3, 0.9, 0.99]), rng.choice([0.0, 0.0, 0.05, 0.5])
        raw = scale * logits(case, vocab_size)
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        if min_p:
            warpers.append(MinPLogitsWarper(min_p))
        expected = torch.softmax(warpers(torch.zeros(1, 1, dtype=torch.int64), raw[None].double())[0], -1)
        count = 250
        params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        grid = [row((i + 0.5) / count, **params) for i in range(count)]
        found = torch.bincount(torch.tensor(ids(sample(raw.expand(count, -1), grid))), minlength=vocab_size)
        # Inverting the cumulative distribution on an even grid gives every share to within one draw.
        assert ((found - count * expected).abs() <= 1 + 1e-6).all(), params
        assert not found[expected == 0].any(), params


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        prompt, output = rng.choices(range(VOCAB), k=rng.randrange(9)), rng.choices(range(VOCAB), k=rng.randrange(9))
        oracle = RepetitionPenaltyLogitsProcessor(penalty)
        expected = oracle(torch.tensor([prompt + output], dtype=torch.int64), logits(seed)[None].clone())
        found, errors = process(logits(seed)[None], [row(prompt=prompt, output=output, repetition_penalty=penalty)])
        assert not errors and torch.equal(found, expected)


def test_presence_and_frequency_count_the_answer_alone() -> None:
    prompt, output = [1, 1, 2], [3, 4, 3, 3]
    expected = logits().double()
    for token, count in Counter(output).items():
        expected[token] -= 0.5 + 0.25 * count
    found, _ = process(
        torch.stack([logits(1), logits(), logits(2)]),
        [
            row(output=output),
            row(prompt=prompt, output=output, presence_penalty=0.5, frequency_penalty=0.25),
            row(prompt=output, presence_penalty=2, frequency_penalty=2),
        ],
    )
    torch.testing.assert_close(found[1], expected.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(found[0], logits(1)) and torch.equal(found[2], logits(2))


def test_logit_bias_adds_to_its_own_row_and_token() -> None:
    rows = torch.stack([logits(0), logits(1), logits(2)])
    found, _ = process(rows.clone(), [row(), row(logit_bias={7: 4.0, 9: -100.0}), row(logit_bias={8: 1.0})])
    expected = rows.clone()
    expected[1, 7] += 4
    expected[1, 9] -= 100
    expected[2, 8] += 1
    assert torch.equal(found, expected)
    assert greedy(logits(), logit_bias={13: 100.0}) == 13


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4])
def test_min_tokens_forbids_stop_tokens_until_the_answer_is_long_enough(length: int) -> None:
    stop = int(logits().argmax())
    second = int(logits().topk(2).indices[1])
    output = [1] * length
    chosen = greedy(logits(), output=output, prompt=[1] * 9, min_tokens=3, stop_token_ids=frozenset({stop, 10**6}))
    assert chosen == (second if length < 3 else stop)


def test_the_steps_come_in_their_documented_order() -> None:
    raw = torch.tensor([2.0, 1.9, -1.0, 0.0])
    params = {"repetition_penalty": 2.0, "presence_penalty": 0.5, "logit_bias": {0: 3.0, 2: 1.0}}
    found, _ = process(raw[None], [row(prompt=[0, 2], output=[2], **params)])
    # 2 / 2 + 3; untouched; -1 * 2 - 0.5 + 1; untouched
    assert found.tolist() == [[4.0, pytest.approx(1.9), -1.5, 0.0]]


@pytest.mark.parametrize("vocab_size", [31, 32, 50, 64, 65])
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_a_constraint_is_obeyed(vocab_size: int, temperature: float) -> None:
    allowed = {0, 5, 30, vocab_size - 1}
    constraint = Allowing(*allowed, vocab_size=vocab_size)
    raw = logits(3, vocab_size)
    found = set(draw(raw, 2_000, temperature=temperature, constraint=constraint))
    best = max(allowed, key=lambda token: raw[token])
    assert found == (allowed if temperature else {best})
    assert set(draw(raw, 500, top_k=2, top_p=0.99, constraint=constraint)) <= allowed


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"constraint": Broken(RuntimeError("boom"))}, EngineFailed),
        ({"constraint": Broken(InvalidRequest("too deep"))}, InvalidRequest),
        ({"constraint": Broken(torch.zeros(1, dtype=torch.int32))}, EngineFailed),
        ({"constraint": Broken(torch.zeros(2, dtype=torch.int64))}, EngineFailed),
        ({"constraint": Broken(None)}, EngineFailed),
        ({"constraint": Allowing()}, InvalidRequest),
        ({"constraint": Allowing(3), "stop_token_ids": frozenset({3}), "min_tokens": 1}, InvalidRequest),
        ({"stop_token_ids": frozenset(range(VOCAB)), "min_tokens": 1}, InvalidRequest),
    ],
)
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.9, "logprobs": 2}])
def test_a_row_without_a_choice_fails_alone(
    kwargs: dict[str, Any], error: type[Exception], params: dict[str, Any]
) -> None:
    rows = torch.stack([logits(0), logits(1), logits(2)])
    beside = [row(0.3, **params), row(0.6, **params, constraint=Allowing(1, 2, 3))]
    clean = sample(rows[[0, 2]], beside)
    found = sample(rows, [beside[0], row(**kwargs | params), beside[1]])
    assert [found[0], found[2]] == clean
    assert type(found[1]) is error


def random_row(rng: random.Random, vocab_size: int) -> SamplingRow:
    def some(limit: int) -> list[int]:
        return rng.choices(range(vocab_size), k=rng.randrange(limit))

    return row(
        rng.random(),
        some(20),
        some(20),
        Allowing(*some(30), 1, vocab_size=vocab_size) if rng.random() < 0.3 else None,
        temperature=rng.choice([0.0, 0.0, 0.7, 1.0, 2.0]),
        top_k=rng.choice([0, 0, 1, 7, 400]),
        top_p=rng.choice([1.0, 1.0, 0.5, 0.95]),
        min_p=rng.choice([0.0, 0.0, 0.02, 0.4]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2, 0.8]),
        presence_penalty=rng.choice([0.0, 0.0, 0.6]),
        frequency_penalty=rng.choice([0.0, 0.0, -0.3]),
        logit_bias={token: rng.uniform(-5, 5) for token in some(4)},
        min_tokens=rng.choice([0, 0, 8]),
        stop_token_ids=frozenset(some(4)) - {1},
        logprobs=rng.choice([None, None, 0, 3, 20]),
    )


@pytest.mark.parametrize("vocab_size", [1, 2, 50, 777, 5001])
def test_a_row_does_not_depend_on_the_rows_beside_it(vocab_size: int) -> None:
    """Whatever is asked for beside it: the same token and the same log-probabilities, to the last bit."""
    rng = random.Random(vocab_size)
    size = 96
    raw = torch.stack([rng.choice([0.1, 1.0, 3.0]) * logits(i, vocab_size) for i in range(size)])
    raw[::5] = raw[::5].bfloat16().float()  # where many logits are equal
    rows = [random_row(rng, max(vocab_size, 2)) for _ in range(size)]
    if vocab_size == 1:
        rows = [replace(item, constraint=None) for item in rows]
    before = raw.clone()
    together = sample(raw, rows)
    assert torch.equal(raw, before)
    alone = [sample(raw[i : i + 1], rows[i : i + 1])[0] for i in range(size)]
    assert [item for item in together if isinstance(item, Sampled)] == [
        item for item in alone if isinstance(item, Sampled)
    ]
    assert list(map(type, together)) == list(map(type, alone))
    shuffled = rng.sample(range(size), size)
    again = sample(raw[shuffled], [rows[i] for i in shuffled])
    assert [type(item) if isinstance(item, Exception) else item for item in again] == [
        type(together[i]) if isinstance(together[i], Exception) else together[i] for i in shuffled
    ]
    assert sum(isinstance(item, Sampled) for item in together) > (0 if vocab_size < 3 else size * 0.9)


def test_how_many_tokens_were_looked_at_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    raw = torch.stack([rng.choice([0.1, 1.0, 3.0]) * logits(i, 3000) for i in range(64)]).bfloat16()
    rows = [replace(random_row(rng, 3000), params=replace(item.params, temperature=1.0)) for item in
            [random_row(rng, 3000) for _ in range(64)]]  # fmt: skip
    expected = list(map(str, sample(raw, rows)))
    for width in (1, 8, 64, 4096):
        monkeypatch.setattr("app.engine.sampler.WIDTH", width)
        assert list(map(str, sample(raw, rows))) == expected


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.5}, {"temperature": 0, "logprobs": 3}], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_row_is_reported_and_its_neighbours_are_not(params: dict[str, Any], poison: float) -> None:
    rows = torch.stack([logits(0), logits(1), logits(2)])
    rows[1, 17] = poison
    clean = sample(rows[[0, 2]], [row(0.3, **params), row(0.6, **params)])
    found = sample(rows, [row(0.3, **params), row(0.5, logit_bias={17: -9.0}, **params), row(0.6, **params)])
    assert [found[0], found[2]] == clean
    assert type(found[1]) is NumericalError


def test_a_token_that_the_model_never_gives_is_no_error() -> None:
    raw = logits()
    raw[3] = NEVER
    assert 3 not in draw(raw, 2_000, temperature=100.0)
    assert type(sample(torch.full((1, VOCAB), NEVER), [row()])[0]) is NumericalError


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.999}, {"top_k": 999, "min_p": 1e-300}], ids=str)
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-3, 100.0])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_extreme_temperatures_and_draws_give_a_token(temperature: float, u: float, filters: dict[str, Any]) -> None:
    (token,) = ids(sample(logits()[None], [row(u, temperature=temperature, **filters)]))
    assert 0 <= token < VOCAB
    if temperature < 1e-2:
        assert token == logits().argmax()


def test_ids_outside_the_vocabulary_have_no_effect() -> None:
    strange, stranger = [-1, VOCAB, 2**40], [-1, VOCAB, 2**70, -(2**70)]
    found, errors = process(
        logits()[None],
        [
            row(
                prompt=strange,
                output=strange,
                repetition_penalty=2.0,
                frequency_penalty=1.0,
                logit_bias=dict.fromkeys(stranger, 5.0),
                stop_token_ids=frozenset(stranger),
                min_tokens=9,
            )
        ],
    )
    assert not errors and torch.equal(found[0], logits())
    found, _ = process(logits()[None], [row(logit_bias={2**70: 5.0, 7: 1.0, -1: 3.0, 8: 2.0})])
    assert (found[0] - logits()).nonzero().flatten().tolist() == [7, 8]
    assert (found[0] - logits())[7:9].tolist() == pytest.approx([1, 2])


def test_logprobs_are_the_models_own() -> None:
    raw = torch.stack([logits(i) for i in range(4)])
    everything = {
        "logit_bias": {5: 100.0}, "temperature": 0.3, "top_k": 1, "repetition_penalty": 3.0, "output": [5, 6]
    }  # fmt: skip
    found = sample(raw, [row(logprobs=3, **everything), row(), row(logprobs=0), row(temperature=0, logprobs=20)])
    expected = torch.log_softmax(raw.double(), -1)
    for i, count in ((0, 3), (2, 0), (3, 20)):
        item = found[i]
        assert isinstance(item, Sampled) and item.logprob is not None
        assert item.logprob.id == item.id
        assert item.logprob.logprob == pytest.approx(float(expected[i, item.id]), abs=1e-6)
        values, best = expected[i].topk(count)
        assert [token for token, _ in item.logprob.top] == best.tolist()
        assert [value for _, value in item.logprob.top] == pytest.approx(values.tolist(), abs=1e-6)
    assert isinstance(found[0], Sampled) and found[0].id == 5
    assert isinstance(found[1], Sampled) and found[1].logprob is None


def test_token_logprobs() -> None:
    raw = torch.stack([logits(i) for i in range(150)])
    targets = [i * 7 % VOCAB for i in range(150)]
    found = token_logprobs(raw, targets, 2)
    expected = torch.log_softmax(raw.double(), -1)
    assert [item.id for item in found] == targets
    assert [item.logprob for item in found] == pytest.approx(
        [float(expected[i, target]) for i, target in enumerate(targets)], abs=1e-6
    )
    assert [[token for token, _ in item.top] for item in found] == expected.topk(2).indices.tolist()
    assert token_logprobs(raw[:0], [], 2) == []
    raw[40, 1] = float("nan")
    with pytest.raises(NumericalError):
        token_logprobs(raw, targets, 0)


def test_equal_logits_rank_in_vocabulary_order() -> None:
    item = token_logprobs(torch.tensor([[1.0, 2.0, 2.0, -0.0, 0.0, 2.0]]), [0], 5)[0]
    assert isinstance(item, Logprob) and [token for token, _ in item.top] == [1, 2, 5, 0, 3]


def run(rows: list[Row], found: torch.Tensor) -> StepOutput:
    """What the model runner makes of logits."""
    runner = ModelRunner(lambda _: found, None, HostCache(0))  # type: ignore[arg-type]
    return runner.run(rows)


def whole(sequence: Sequence) -> Row:
    return Row(sequence, 0, sequence.num_tokens)


def scoring_rows(count: int, vocab_size: int) -> list[Row]:
    """Contexts, from whose one position several tokens are scored, and continuations of some positions."""
    rows: list[Row] = []
    for i in range(count):
        targets = [[(i * 7 + j) % vocab_size, (i + j) % vocab_size, j] for j in range(3)]
        score = Score(f"score:{i}", None, targets, lambda _: None)
        context = ContextSequence([1, 2, 3], score=score)
        continuation = ContinuationSequence([1, 2, 3, *targets[1]], score=score, index=1)
        rows += [whole(context), whole(continuation)]
    return rows


def scoring_logits(rows: list[Row], vocab_size: int) -> torch.Tensor:
    return torch.stack([logits(i, vocab_size) for i in range(sum(row.num_logits for row in rows))])


@pytest.mark.parametrize("vocab_size", [VOCAB, 40_000])
def test_scores_of_a_row_do_not_depend_on_the_rows_beside_it(vocab_size: int) -> None:
    rows = scoring_rows(4, vocab_size)
    raw = scoring_logits(rows, vocab_size)
    raw[9, 3] = float("nan")
    together = run(rows, raw).scores
    assert [isinstance(together[row], NumericalError) for row in rows] == [False] * 5 + [True] + [False] * 2
    start = 0
    for row in rows:
        end = start + row.num_logits
        alone = run([row], raw[start:end]).scores[row]
        if not isinstance(alone, Exception):
            assert alone == together[row], "to the last bit"
            expected = torch.log_softmax(raw[start:end].double(), -1)
            sequence = row.sequence
            if isinstance(sequence, ContinuationSequence):
                values = [expected[i, t] for i, t in enumerate(sequence.targets(row.start, row.end))]
            else:
                assert isinstance(sequence, ContextSequence)
                values = [expected[0, tokens[0]] for tokens in sequence.score.continuations]
            assert alone == pytest.approx([float(value) for value in values], abs=1e-5)
        start = end


class CountingOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


def test_scoring_many_rows_takes_no_more_operations_than_scoring_one() -> None:
    counts = []
    for size in (1, 30):
        rows = scoring_rows(size, VOCAB)
        with CountingOperations() as counting:
            run(rows, torch.zeros(4 * size, VOCAB))
        counts.append(counting.count)
    assert 0 < counts[0] == counts[1]


def test_target_logprobs_of_a_token_that_the_model_never_gives() -> None:
    raw = torch.stack([logits(0), torch.full((VOCAB,), NEVER), logits(1)])
    raw[0, 3] = NEVER
    found = target_logprobs(raw, [0, 2, 0, 1], [3, 4, 5, 6])
    assert found[0] == NEVER and found[3] != found[3]
    expected = torch.log_softmax(raw.double(), -1)
    assert found[1:3] == pytest.approx([float(expected[2, 4]), float(expected[0, 5])], abs=1e-6)


def test_broken_logits_of_a_prompt_fail_its_row_alone() -> None:
    params = SamplingParams(temperature=0, prompt_logprobs=1)
    rows = [whole(GenerationSequence([1, 2, 3], params=params)) for _ in range(3)]
    rows[2] = Row(rows[2].sequence, 0, 2)  # not yet the whole prompt
    raw = torch.stack([logits(i) for i in range(8)])
    clean = run(rows[:1], raw[:3])
    raw[4, 17] = raw[6, 17] = float("nan")
    output = run(rows, raw)
    assert output.tokens[rows[0]] == clean.tokens[rows[0]]
    assert output.prompt_logprobs == {rows[0]: clean.prompt_logprobs[rows[0]]}
    assert type(output.tokens[rows[1]]) is type(output.tokens[rows[2]]) is NumericalError


def test_a_penalised_row_shares_its_sequences_text() -> None:
    sequence = GenerationSequence([1, 2, 3], params=SamplingParams(repetition_penalty=2.0))
    assert _sampling_row(sequence).token_ids is sequence.token_ids


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 777, 6400])
def test_ranked_is_a_stable_sort(vocab_size: int) -> None:
    raw = torch.stack([logits(i, vocab_size).round() for i in range(5)])
    raw[1, ::2] = NEVER
    expected = raw.sort(dim=-1, descending=True, stable=True).indices
    for count in {1, 5, min(60, vocab_size), vocab_size // 2 + 1, vocab_size}:
        if count <= vocab_size:
            assert torch.equal(ranked(raw, count), expected[:, :count])


@pytest.mark.parametrize("width", [1, 2, 3, 7, 64, 100])
def test_crossing_inverts_the_cumulative_sum(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    leaves = torch.randint(0, 3, (200, width), generator=generator).double()  # exact, with zeros
    leaves[:, width // 2] += 1
    sums = tree(leaves)
    cumulative = leaves.cumsum(-1)
    thresholds = torch.randint(0, 10**6, (200,), generator=generator) % cumulative[:, -1]
    found = crossing(sums, thresholds, inclusive=False)
    assert torch.equal(found, (cumulative <= thresholds[:, None]).sum(-1))
    found = crossing(sums, thresholds + 1, inclusive=True)
    assert torch.equal(found, (cumulative < thresholds[:, None] + 1).sum(-1))
    beyond = crossing(sums, cumulative[:, -1] * 2, inclusive=False)
    assert (leaves.gather(-1, beyond[:, None]) > 0).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 1e300),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.1),
        ("min_tokens", 17),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {3: 101}),
        ("logprobs", 21),
        ("seed", 2**70),
    ],
)
def test_parameters_out_of_range_name_themselves(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
