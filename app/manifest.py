"""manifest.json: what the server needs to know about a version beyond PEFT's two files, and where it came from."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.text import Template

Label = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=200)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BaseReference(_Strict):
    """The base model a prompt was trained on."""

    name: Annotated[str, StringConstraints(max_length=200)]
    fingerprint: Annotated[str, StringConstraints(max_length=100)] | None = None


class Defaults(_Strict):
    """Sampling defaults of a version; a request's own fields win."""

    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop: Annotated[list[StopString], Field(max_length=16)] | None = None


MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0  # of a classifier: beyond, every probability is 0 and 1, or the same

Loss = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Calibration(_Strict):
    """A classifier's scores are divided by `temperature` before they become probabilities (Guo et al. 2017).

    The rest says what it was fitted on: rows, negative log-likelihood (nats per row) and expected calibration error.
    """

    temperature: Annotated[float, Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)]
    rows: Annotated[int, Field(ge=1)] | None = None
    nll_before: Loss | None = None
    nll_after: Loss | None = None
    ece_before: Share | None = None
    ece_after: Share | None = None


class ManifestInput(_Strict):
    """What an uploader may say. Everything is optional: a bare PEFT folder is served as it is."""

    base: BaseReference | None = None
    template: Annotated[str, StringConstraints(max_length=10_000)] | None = None
    labels: Annotated[list[Label], Field(min_length=2, max_length=1_000)] | None = None
    calibration: Calibration | None = None  # of the probabilities of `labels`
    defaults: Defaults = Defaults()
    task_id: Annotated[int, Field(ge=0)] = 0  # row of a MULTITASK_PROMPT_TUNING checkpoint
    metrics: dict[str, Any] = Field(default_factory=dict)
    lineage: dict[str, Any] = Field(default_factory=dict)
    tags: Annotated[dict[Tag, Tag], Field(max_length=64)] = Field(default_factory=dict)
    description: Annotated[str, StringConstraints(max_length=4_000)] = ""


class Manifest(ManifestInput):
    """The stored manifest.json: the uploader's part and what the server found."""

    digest: str
    created_at: str  # RFC 3339, UTC
    peft_type: str
    num_virtual_tokens: int
    size_bytes: int  # adapter_model.safetensors as uploaded

    @property
    def parsed_template(self) -> Template:
        return Template(self.template)
