"""POST /v1/classify: which label the model finds likeliest, by exact likelihood instead of generated text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse, Response

from app.api.body import JsonRoute
from app.api.concurrency import disconnection, first, together
from app.api.deps import StateDep
from app.api.lease import leased
from app.api.reply import encode, identity, prompt_headers, usage
from app.api.schemas import ClassifyReply, ClassifyRequest, as_list
from app.errors import InvalidRequest
from app.registry import Version
from app.text import Template

MAX_SCORED = 4096  # labels times inputs

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
    request: Request, body: Annotated[ClassifyRequest, Body(openapi_examples=_EXAMPLES)], state: StateDep
) -> Response:
    """Choose a label for each input.

    A label's score is the summed log-likelihood of its tokens behind the input; probabilities are the softmax
    of the scores over the labels. A label whose tokens begin another label's never scores below it.
    """
    inputs = as_list(body.input)
    async with leased(state, body.task) as lease:
        labels = _labels(body, lease.version, len(inputs))
        template = lease.version.manifest.parsed_template if lease.version else Template()
        tokenizer = state.base.tokenizer
        prompts = await encode(tokenizer, [template.prompt(text) for text in inputs])
        targets = await encode(tokenizer, [template.target(label) for label in labels], add_special_tokens=False)
        if not all(targets):
            raise InvalidRequest("labels: one has no tokens", param="labels")
        work = together(lease.score(state.engine, prompt, targets) for prompt in prompts)
        scored = await first(work, disconnection(request.receive))
    results = []
    for index, logprobs in enumerate(scored):
        probabilities = softmax([math.fsum(tokens) for tokens in logprobs])
        best = max(range(len(labels)), key=probabilities.__getitem__)
        by_label = dict(zip(labels, probabilities, strict=True))
        results.append({"index": index, "label": labels[best], "probabilities": by_label})
    reply = {
        **identity("cls", state.base.info, lease.version),
        "results": results,
        "usage": usage(lease, prompts, num_generated=0).model_dump(),
    }
    return JSONResponse(reply, headers=prompt_headers(lease.version))


def softmax(scores: Sequence[float]) -> list[float]:
    """In float64, safe for scores of any size. At least one score must be finite."""
    largest = max(scores)
    powers = [math.exp(score - largest) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


def _labels(body: ClassifyRequest, version: Version | None, num_inputs: int) -> list[str]:
    labels = body.labels or (version and version.manifest.labels)
    if not labels:
        raise InvalidRequest("labels: neither the request nor the version has any", param="labels")
    if len(set(labels)) < len(labels):
        raise InvalidRequest("labels: one occurs twice", param="labels")
    if len(labels) * num_inputs > MAX_SCORED:
        found = f"{len(labels)} labels for {num_inputs} inputs"
        raise InvalidRequest(f"labels: {found} exceed {MAX_SCORED} scores in one request", param="labels")
    return labels
