"""What /metrics says, as Prometheus would read it."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient


@dataclass(frozen=True)
class Scrape:
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]
    kinds: dict[str, str]  # of every sample's name

    @classmethod
    def of(cls, text: str) -> Scrape:
        samples, kinds = {}, {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in samples, f"{sample.name} is there twice with the same labels"
                samples[key], kinds[sample.name] = sample.value, family.type
        return cls(samples, kinds)

    @classmethod
    def by(cls, client: TestClient, headers: dict[str, str] | None = None) -> Scrape:
        reply = client.get("/metrics", headers=headers)
        assert reply.status_code == 200 and reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        return cls.of(reply.text)

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of what has this name (without `softprompt_`) and these labels."""
        name = name if ":" in name else f"softprompt_{name}"
        wanted = labels.items()
        return sum(value for (own, found), value in self.samples.items() if own == name and wanted <= set(found))

    def values(self, label: str) -> set[str]:
        return {value for _, found in self.samples for name, value in found if name == label}

    @property
    def names(self) -> set[str]:
        return set(self.kinds)

    @property
    def counters(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Everything that must never fall."""
        return {key: value for key, value in self.samples.items() if self.kinds[key[0]] in ("counter", "histogram")}
