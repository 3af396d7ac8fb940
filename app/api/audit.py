"""GET /v1/audit: who changed what, and who was refused."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from app.api.deps import StateDep
from app.api.paging import Limit, paged
from app.api.schemas import AuditReply, Page

router = APIRouter(prefix="/v1/audit", tags=["operations"])


@router.get("", response_model=Page[AuditReply])
async def list_audit(
    state: StateDep,
    limit: Limit = 100,
    after: Annotated[int | None, Query(ge=1, lt=2**63, description="The last one of the page before")] = None,
) -> Any:
    """Changes, and calls refused for want of a scope, the newest first. Empty without a database of keys."""
    entries = await state.access.audit_page(limit=limit + 1, before=after)
    return paged([{"object": "audit_entry", **vars(entry)} for entry in entries], limit)
