"""The routes of one application for all those of a test process: FastAPI takes 0.2 s to make them, of each anew."""

from __future__ import annotations

from typing import Any

from fastapi import routing


def share_routes() -> None:
    """What FastAPI makes of a route differs between the applications of tests by nothing that they use.

    Its `dependency_overrides_provider` is the first application's; no test overrides a dependency.
    """
    make = routing._EffectiveRouteContext.from_api_route
    made: dict[Any, Any] = {}

    def shared(*, original_route: Any, include_context: Any) -> Any:
        # The dependencies are there for the sake of one test, which leaves `authorise` out.
        dependencies = tuple(depends.dependency for depends in include_context.dependencies)
        key = (id(original_route), include_context.prefix, include_context.max_body_size, dependencies)
        if key not in made:
            made[key] = make(original_route=original_route, include_context=include_context)
        return made[key]  # which holds the route, so that its id stays its own

    routing._EffectiveRouteContext.from_api_route = shared  # type: ignore[method-assign]
