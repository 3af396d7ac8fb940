"""What a command says of a version that it has published."""

from __future__ import annotations

from typing import Any

from app.cli.output import warn, write


def tell_published(published: Any) -> None:
    for warning in published.warnings:
        warn(warning)
    verb = "published" if published.created else "was published before as"
    write(f"{verb} {published.version.reference}  {published.version.digest}")


def published_document(published: Any) -> dict[str, Any]:
    version = published.version
    return {
        "reference": version.reference,
        "digest": version.digest,
        "created": published.created,
        "warnings": list(published.warnings),
        "metrics": version.manifest.metrics,
    }
