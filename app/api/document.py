"""The OpenAPI document: what FastAPI makes of the routes, and the key that each of them needs."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from app.api.scopes import ANY_KEY, NEEDS, PUBLIC

_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key: `Authorization: Bearer sk-...`"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key"},
}


def install(app: FastAPI) -> None:
    """Have the document say what a key must allow for each operation, as `x-scope`; the server may have no keys."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
            document["components"]["securitySchemes"] = _SCHEMES
            for item in document["paths"].values():
                for operation in item.values():
                    _secure(operation)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's own documentation does


def _secure(operation: dict[str, Any]) -> None:
    scope = NEEDS[operation["operationId"]]
    if scope == PUBLIC:
        return
    # One of these, or none: a server without keys is open.
    operation["security"] = [{name: []} for name in _SCHEMES] + [{}]
    if scope != ANY_KEY:
        operation["x-scope"] = scope
