"""POST /v1/classify: which label the model finds likeliest, by exact likelihood instead of generated text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse, Response

from app.api.access import CallerDep
from app.api.body import JsonRoute
from app.api.concurrency import disconnection, first, together
from app.api.deadline import DeadlineDep, until
from app.api.deps import StateDep, get_stats
from app.api.lease import Lease, leased
from app.api.reply import about_input, encode, identity, prompt_headers, usage
from app.api.schemas import ClassifyReply, ClassifyRequest, as_list
from app.errors import InvalidRequest
from app.registry import Version
from app.text import Template

MAX_SCORED = 4096  # labels times inputs times members

router = APIRouter(route_class=JsonRoute, tags=["generation"])

_EXAMPLES: dict[str, Any] = {
    "version": {
        "summary": "The version's own labels",
        "value": {"task": "sentiment", "input": "a gripping film from start to finish"},
    },
    "labels": {
        "summary": "Labels of the request",
        "value": {"task": "topic", "input": ["rates rise again"], "labels": ["economy", "sport", "science"]},
    },
}


@router.post("/v1/classify", response_model=ClassifyReply)
async def classify(
    request: Request,
    body: Annotated[ClassifyRequest, Body(openapi_examples=_EXAMPLES)],
    state: StateDep,
    deadline: DeadlineDep,
    caller: CallerDep,
) -> Response:
    """Choose a label for each input.

    A label's score is the summed log-likelihood of its tokens behind the input; probabilities are the softmax
    of the scores over the labels, which are first divided by the version's temperature where it was calibrated for
    these labels (Guo et al. 2017); the likeliest stays the likeliest. A label whose tokens begin another label's never
    scores below it. An ensemble's probabilities are the mean of its members', each calibrated for itself (Lester et al.
    2021, section 6).
    """
    inputs, stats = as_list(body.input), get_stats(request)
    _check_rows(body, state.max_rows)
    with until(deadline):
        async with leased(state, caller, body.task, stats, user=body.user) as leases:
            labels = _labels(body, [lease.version for lease in leases], len(inputs))
            temperatures = [_temperature(body, lease.version, labels) for lease in leases]
            work = [await _encode(state.base.tokenizer, lease, inputs, labels) for lease in leases]
            texts = [texts for texts, _ in work]
            if state.settings.log_prompts:
                tokenizer: Any = state.base.tokenizer
                stats.prompts = [tokenizer.decode(text) for own in texts for text in own]
            used = usage(list(zip(leases, texts, strict=True)))

            async def score(lease: Lease, number: int, text: list[int], targets: list[list[int]]) -> list[list[float]]:
                with about_input(number, len(inputs)):
                    found = await lease.score(state.engine, text, targets, salt=caller.salt(body.cache_salt))
                # Here, because others may fail or never have their turn.
                caller.spend(len(text))
                stats.reads(lease.version, len(text))
                stats.finishes(lease.version, "scored")
                return found

            scores = together(
                score(lease, number, text, targets)
                for lease, (texts, targets) in zip(leases, work, strict=True)
                for number, text in enumerate(texts)
            )
            scored = await first(scores, disconnection(request.receive))
            stats.is_answered = True
    results = []
    for index in range(len(inputs)):
        scores_by_member = [[math.fsum(tokens) for tokens in logprobs] for logprobs in scored[index :: len(inputs)]]
        by_member = list(map(softmax, scores_by_member, temperatures))
        probabilities = [math.fsum(member) / len(by_member) for member in zip(*by_member, strict=True)]
        # NOTE: of one version by the scores: what differs there may be rounded to equal probabilities.
        decisive = probabilities if len(leases) > 1 else scores_by_member[0]
        best = max(range(len(labels)), key=decisive.__getitem__)
        by_label = dict(zip(labels, probabilities, strict=True))
        results.append({"index": index, "label": labels[best], "probabilities": by_label})
    calibrated = [temperature is not None for temperature in temperatures]
    made_by = identity("cls", state.base.info, leases)
    for member, own in zip(made_by.get("members", ()), calibrated, strict=False):
        member["calibrated"] = own
    reply = {
        **made_by,
        "calibrated": calibrated[0] if len(leases) == 1 else None,
        "results": results,
        "usage": used,
    }
    return JSONResponse(reply, headers=prompt_headers(leases))


async def _encode(
    tokenizer: Any, lease: Lease, inputs: list[str], labels: list[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """The texts and the labels' continuations of them, as token ids, by the version's template."""
    template = lease.version.manifest.parsed_template if lease.version else Template()
    texts = await encode(tokenizer, [template.prompt(text) for text in inputs])
    targets = await encode(tokenizer, [template.target(label) for label in labels], add_special_tokens=False)
    if not all(targets):
        raise InvalidRequest("labels: one has no tokens", param="labels")
    return texts, targets


def _temperature(body: ClassifyRequest, version: Version | None, labels: Sequence[str]) -> float | None:
    """What the version's scores are divided by. Raises InvalidRequest if that is asked for and there is nothing."""
    calibration = version and version.manifest.calibration
    fits = calibration and version and sorted(version.manifest.labels or ()) == sorted(labels)
    if body.calibrated and not fits:
        raise InvalidRequest(
            "calibrated: there is no calibration for this version and these labels", param="calibrated"
        )
    return calibration.temperature if calibration and fits and body.calibrated is not False else None


def softmax(scores: Sequence[float], temperature: float | None = None) -> list[float]:
    """In float64, safe for scores of any size. Where all are minus infinity, none is likelier than another."""
    largest = max(scores)
    if largest == -math.inf:
        return [1 / len(scores)] * len(scores)
    powers = [math.exp((score - largest) / (temperature or 1.0)) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


def _check_rows(body: ClassifyRequest, max_rows: int) -> None:
    """Raises InvalidRequest. Each input is a row behind each member; labels need no room of their own."""
    members = len(body.task) if isinstance(body.task, list) else 1
    count = len(as_list(body.input)) * members
    if count > max_rows:
        param = "input" if members == 1 else "task"
        found = f"{count} inputs" + ", counted for each member," * (members > 1)
        raise InvalidRequest(f"{param}: {found} exceed {max_rows} in one request", param=param)


def _labels(body: ClassifyRequest, versions: Sequence[Version | None], num_inputs: int) -> list[str]:
    labels = body.labels or (versions[0] and versions[0].manifest.labels)
    if not labels:
        raise InvalidRequest("labels: neither the request nor the version has any", param="labels")
    if len(set(labels)) < len(labels):
        raise InvalidRequest("labels: one occurs twice", param="labels")
    if body.labels is None:
        for version in versions:
            if version is None or sorted(version.manifest.labels or []) != sorted(labels):
                raise InvalidRequest("labels: the members of the ensemble have different ones", param="labels")
    if len(labels) * num_inputs * len(versions) > MAX_SCORED:
        found = f"{len(labels)} labels for {num_inputs} inputs" + f" and {len(versions)} members" * (len(versions) > 1)
        raise InvalidRequest(f"labels: {found} exceed {MAX_SCORED} scores in one request", param="labels")
    return labels
