"""Temperature scaling: fitted against oracles of our own making, stored in manifests, applied by /v1/classify."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from app.api.classify import softmax
from app.checkpoint import content_digest, read_manifest
from app.errors import InvalidPromptFile, InvalidTrainingData
from app.manifest import Calibration, ManifestInput
from app.train.calibration import HIGHEST, LOWEST, MIN_ROWS, Judged, fit
from tests.api_harness import Harness
from tests.shipped import PROMPTS

# Shipped versions that were written before there was such a field.
WITHOUT = ("address_parse", "clinc_domain", "disfl_qa", "sentiment_mixed")
LABELS = ["a", "b", "c"]
Table = list[list[float]]


def drawn(seed: int, *, rows: int = 400, labels: int = 3, temperature: float = 1.0) -> tuple[Table, list[int]]:
    """Scores, and targets by the probabilities that these scores give at `temperature`."""
    rng = random.Random(seed)
    table = [[rng.gauss(-3.0, 2.5) for _ in range(labels)] for _ in range(rows)]
    targets = [rng.choices(range(labels), softmax(row, temperature))[0] for row in table]
    return table, targets


def judged(table: Table, targets: list[int]) -> Judged:
    names = [str(i) for i in range(len(table[0]))]
    return Judged.of(table, [str(target) for target in targets], names)


def plain_nll(table: Table, targets: list[int], temperature: float) -> float:
    """By the definition, one logarithm a row."""
    return -sum(
        math.log(math.exp(row[target] / temperature) / sum(math.exp(score / temperature) for score in row))
        for row, target in zip(table, targets, strict=True)
    ) / len(table)


def plain_ece(table: Table, targets: list[int], temperature: float) -> float:
    """Guo et al. 2017, equation 3, bin by bin."""
    found = 0.0
    for m in range(1, 16):
        inside = []
        for row, target in zip(table, targets, strict=True):
            powers = [math.exp(score / temperature) for score in row]
            confidence = max(powers) / sum(powers)
            if (m - 1) / 15 < confidence <= m / 15:
                inside.append((confidence, row.index(max(row)) == target))
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            found += abs(accuracy - sum(confidence for confidence, _ in inside) / len(inside)) * len(inside)
    return found / len(table)


@pytest.mark.parametrize(("seed", "labels", "temperature"), [(0, 2, 1.0), (1, 3, 2.5), (2, 11, 0.4), (3, 3, 6.0)])
def test_the_least_loss_is_found(seed: int, labels: int, temperature: float) -> None:
    table, targets = drawn(seed, labels=labels, temperature=temperature)
    found = fit(judged(table, targets))
    grid = [math.exp(math.log(LOWEST) + i * math.log(HIGHEST / LOWEST) / 600) for i in range(601)]
    best = min(grid, key=lambda t: plain_nll(table, targets, t))
    assert found.temperature == pytest.approx(best, rel=0.011), "a step of the grid is 1 %"
    assert found.temperature == pytest.approx(temperature, rel=0.25), "what the targets were drawn with"
    assert found.rows == len(table)
    assert found.nll_before == pytest.approx(plain_nll(table, targets, 1.0), abs=1e-4)
    assert found.nll_after == pytest.approx(plain_nll(table, targets, found.temperature), abs=1e-4)
    assert found.nll_after <= found.nll_before
    assert found.ece_before == pytest.approx(plain_ece(table, targets, 1.0), abs=1e-4)
    assert found.ece_after == pytest.approx(plain_ece(table, targets, found.temperature), abs=1e-4)


def test_overconfident_scores_get_a_smaller_error() -> None:
    table, targets = drawn(7, rows=2000, temperature=3.0)
    found = fit(judged(table, targets))
    assert found.ece_before is not None and found.ece_after is not None
    assert found.ece_before > 0.15 and found.ece_after < 0.05


RIGHT = [[0.0, -3.0]] * 30


@pytest.mark.parametrize(
    ("table", "targets", "says"),
    [
        ([[0.0, -1.0]], [0], "1 rows are too few"),
        (RIGHT[: MIN_ROWS - 1], [0] * (MIN_ROWS - 1), "too few"),
        (RIGHT, [0] * 30, "30 of them right, give no temperature"),
        (RIGHT, [1] * 30, "0 of them right, give no temperature"),
        ([[-2.0, -2.0]] * 30, [0, 1] * 15, "give no temperature"),
        ([[-math.inf, 0.0]] * 30, [0] * 30, "0 rows are too few"),
    ],
    ids=["one row", "few rows", "all right", "all wrong", "all the same", "impossible"],
)
def test_rows_that_cannot_tell_are_refused(table: Table, targets: list[int], says: str) -> None:
    with pytest.raises(InvalidTrainingData, match=says):
        fit(judged(table, targets))


def test_rows_that_no_temperature_mends_are_left_out() -> None:
    table, targets = drawn(5)
    mixed = judged([*table, [-math.inf, 0.0, 0.0]], [*targets, 0])
    assert len(mixed) == len(table) and fit(mixed) == fit(judged(table, targets))
    assert len(Judged.of([[0.0, -1.0]] * 2, ["0", "other"], ["0", "1"])) == 1
    ruled_out = judged([[*row, -math.inf] for row in table], targets)
    assert fit(ruled_out).temperature == fit(judged(table, targets)).temperature, "other labels may be impossible"


# -- the manifest --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "calibration",
    [
        *({"temperature": bad} for bad in (0, -1, 1e-9, 1e9, "1", True, None, [1.0])),
        {},
        {"temperature": 1.0, "ece_after": 1.5},
        {"temperature": 1.0, "nll_after": -0.1},
        {"temperature": 1.0, "rows": 0},
        {"temperature": 1.0, "bias": 1.0},
    ],
)
def test_hostile_calibrations_are_refused(calibration: Any) -> None:
    with pytest.raises(InvalidPromptFile) as caught:
        read_manifest(json.dumps({"labels": LABELS, "calibration": calibration}).encode())
    assert caught.value.code == "invalid_manifest" and "calibration" in caught.value.message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(number: str) -> None:
    with pytest.raises(InvalidPromptFile):
        read_manifest(b'{"labels": ["a", "b"], "calibration": {"temperature": %s}}' % number.encode())
    with pytest.raises(ValueError):
        Calibration(temperature=float(number))
    with pytest.raises(ValueError):
        Calibration(temperature=1.0, nll_before=float(number))


def test_it_is_content_and_manifests_without_it_keep_their_digest(tmp_path: Path) -> None:
    bare, with_one = ManifestInput(labels=LABELS), ManifestInput(labels=LABELS, calibration=Calibration(temperature=2))
    digests = {content_digest(b"c", b"t", manifest) for manifest in (bare, with_one)}
    assert len(digests) == 2, "it answers with other probabilities, so it is another version"
    for folder in (PROMPTS / task / "versions" / "1" for task in WITHOUT):
        raw = (folder / "manifest.json").read_bytes()
        files = [(folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
        assert "calibration" not in json.loads(raw)
        assert content_digest(files[0], files[1], read_manifest(raw)) == json.loads(raw)["digest"]
    harness = Harness.create(tmp_path / "prompts")
    with pytest.raises(InvalidPromptFile, match="for a version with labels"):
        harness.publish("task", calibration=Calibration(temperature=2.0))


# -- /v1/classify --------------------------------------------------------------------------------------------------


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    harness = Harness.create(tmp_path / "prompts")
    harness.publish("plain", 0.1, labels=LABELS)
    harness.publish("hot", 0.2, labels=LABELS, calibration=Calibration(temperature=2.5))
    harness.publish("cold", 0.3, labels=LABELS[::-1], calibration=Calibration(temperature=0.5))
    return harness


def scripted(harness: Harness, scores: dict[str, float]) -> None:
    by_tokens = {tuple(harness.tokens(label)): score for label, score in scores.items()}
    harness.engine.logprobs = lambda tokens: [by_tokens[tuple(tokens)] / 2] * 2


def classified(harness: Harness, status: int = 200, **body: Any) -> dict[str, Any]:
    with harness.client() as client:
        reply = client.post("/v1/classify", json={"input": "x", **body})
    assert reply.status_code == status, reply.text
    found: dict[str, Any] = reply.json()
    return found


def test_scores_are_divided_before_they_are_normalised(harness: Harness) -> None:
    scores = {"a": -1.0, "b": -3.0, "c": -2.0}
    scripted(harness, scores)

    def at(temperature: float) -> dict[str, Any]:
        weights = {label: math.exp(score / temperature) for label, score in scores.items()}
        return {label: pytest.approx(weight / sum(weights.values()), rel=1e-12) for label, weight in weights.items()}

    for body, temperature in (
        ({"task": "plain"}, None),
        ({"task": "plain", "calibrated": False}, None),
        ({"task": "hot"}, 2.5),
        ({"task": "hot", "calibrated": None}, 2.5),
        ({"task": "hot", "calibrated": True}, 2.5),
        ({"task": "hot", "calibrated": False}, None),
        ({"task": "cold"}, 0.5),
        ({"task": "cold", "labels": LABELS}, 0.5),
        ({"task": "hot", "labels": ["a", "b"]}, None),
    ):
        reply = classified(harness, **body)
        assert reply["calibrated"] is (temperature is not None), body
        if "b" in scores and len(reply["results"][0]["probabilities"]) == 3:
            assert reply["results"][0]["probabilities"] == at(temperature or 1.0), body


@pytest.mark.parametrize(
    "body",
    [{"task": "plain"}, {"task": "hot", "labels": ["a", "b"]}, {"labels": LABELS}, {"task": ["hot", "plain"]}],
)
def test_what_is_asked_for_and_cannot_be_had_is_refused(harness: Harness, body: dict[str, Any]) -> None:
    assert classified(harness, 400, **body, calibrated=True)["error"]["param"] == "calibrated"
    assert not harness.engine.calls and harness.num_pins == 0


def test_each_member_of_an_ensemble_has_its_own(harness: Harness) -> None:
    scores = {"a": -1.0, "b": -3.0, "c": -2.0}
    scripted(harness, scores)
    reply = classified(harness, task=["plain", "hot", "cold"])
    assert reply["calibrated"] is None
    assert [member["calibrated"] for member in reply["members"]] == [False, True, True]
    values = [softmax(list(scores.values()), temperature) for temperature in (1.0, 2.5, 0.5)]
    expected = [sum(column) / 3 for column in zip(*values, strict=True)]
    assert list(reply["results"][0]["probabilities"].values()) == pytest.approx(expected, rel=1e-12)
    off = classified(harness, task=["plain", "hot", "cold"], calibrated=False)
    assert [member["calibrated"] for member in off["members"]] == [False] * 3


@pytest.mark.parametrize("temperature", [0.01, 0.37, 100.0])
def test_the_likeliest_label_never_changes(harness: Harness, temperature: float) -> None:
    """Not even where two scores are so near that their probabilities are the same number."""
    harness.publish("task", 0.4, labels=LABELS, calibration=Calibration(temperature=temperature))
    rng = random.Random(1)
    with harness.client() as client:
        for trial in range(60):
            first = rng.uniform(-30, 0)
            near = [first, math.nextafter(first, 0.0), first - 1e-9]
            scores = rng.sample(near, 3) if trial % 2 else [rng.uniform(-60, 0) for _ in LABELS]
            scripted(harness, dict(zip(LABELS, scores, strict=True)))
            found = [
                client.post("/v1/classify", json={"task": "task", "input": "x", "calibrated": calibrated}).json()
                for calibrated in (True, False)
            ]
            labels = [reply["results"][0]["label"] for reply in found]
            assert labels == [LABELS[scores.index(max(scores))]] * 2
