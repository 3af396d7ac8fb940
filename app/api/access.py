"""The one place that decides who may call a route: a dependency of every route, which denies by default."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from app.access import Caller
from app.api.deps import get_state
from app.api.scopes import ANY_KEY, NEEDS, PUBLIC
from app.api.visible import check_reference, check_task
from app.errors import AuthenticationRequired, PermissionDenied


async def authorise(request: Request) -> Caller:
    """Let the request in, once; what it holds from then on is given back by `SettleMiddleware`.

    In this order: AuthenticationRequired (NotReady while the keys cannot be checked), RateLimited, PermissionDenied,
    ReferenceNotFound for names that the key may not know of.
    """
    # NOTE: by the route that was chosen, never by the URL, which is what the client makes it.
    route = request.scope["route"].name
    needs = NEEDS.get(route)
    if needs == PUBLIC:
        return Caller()
    admitted: Caller | None = getattr(request.state, "admitted", None)
    if admitted is not None:
        return admitted
    state = get_state(request)
    caller = await state.access.authenticate(_secret(request))
    request.state.caller = caller
    if caller.meter is not None:
        request.state.place = caller.meter.admit(generates=needs == "generate")
    if needs is None:
        raise PermissionDenied("this route is open to nobody")
    caller.check_scope(None if needs == ANY_KEY else needs)
    if "task" in request.path_params:
        check_task(caller, request.path_params["task"])
    if "reference" in request.path_params:
        check_reference(caller, request.path_params["reference"], state.base.info.name)
    request.state.admitted = caller
    return caller


CallerDep = Annotated[Caller, Depends(authorise)]


def _secret(request: Request) -> str | None:
    """From the headers alone: a URL ends up in logs."""
    given = request.headers.getlist("authorization")
    if len(given) > 1:
        raise AuthenticationRequired("this needs a valid key: Authorization: Bearer sk-...")
    scheme, _, token = given[0].partition(" ") if given else ("", "", "")
    if scheme.lower() == "bearer":
        return token.strip()
    # Another scheme may be the business of a proxy.
    return request.headers.get("x-api-key")
