"""/v1/files: training files, as OpenAI's clients upload them."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from app.access import Caller
from app.api.access import CallerDep
from app.api.body import content_type
from app.api.deps import State, StateDep
from app.api.multipart import read_form
from app.api.openai.fine_tuning_schemas import FileDeleted, FileReply
from app.api.paging import After, paged
from app.api.schemas import Page
from app.api.upload import upload_place
from app.errors import BodyTooLarge, InvalidRequest, UnsupportedMediaType
from app.jobs import Job, TrainingFile
from app.jobs.names import unknown

router = APIRouter(prefix="/v1/files", tags=["training"])

PURPOSE = "fine-tune"
MAX_OVERHEAD = 16_384  # bytes of multipart framing and of the other parts

_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"type": "string", "enum": [PURPOSE]},
                },
            },
            "examples": {
                "rows": {"value": {"file": '{"input": "I love it", "target": "positive"}', "purpose": PURPOSE}}
            },
        }
    },
}


def is_theirs(caller: Caller, item: TrainingFile | Job) -> bool:
    """A key sees what keys of its tenant made, an admin's all."""
    return caller.key is None or caller.key.has("admin") or item.tenant == caller.tenant


async def find_file(state: State, caller: Caller, file_id: str) -> TrainingFile:
    """Raises ReferenceNotFound."""
    found = await state.storing.run(partial(state.files.get, file_id))
    if not is_theirs(caller, found):
        raise unknown("file")
    return found


async def _file(file: str, state: StateDep, caller: CallerDep) -> TrainingFile:
    return await find_file(state, caller, file)


FileDep = Annotated[TrainingFile, Depends(_file)]


@router.post("", dependencies=[Depends(upload_place)], response_model=FileReply, openapi_extra={"requestBody": _BODY})
async def create_file(request: Request, state: StateDep, caller: CallerDep) -> Any:
    """Upload JSON lines of `{"input", "target"}`, `{"prompt", "completion"}` or `{"messages"}`. A job checks them."""
    if content_type(request) != "multipart/form-data":
        raise UnsupportedMediaType("the body must be multipart/form-data")
    most = state.settings.max_training_file_bytes
    parts = await read_form(request, most + MAX_OVERHEAD, ("file", "purpose"), required=("file", "purpose"))
    if parts["purpose"].data != PURPOSE.encode():
        raise InvalidRequest(f"purpose must be {PURPOSE}", param="purpose")
    given = parts["file"]
    if len(given.data) > most:
        raise BodyTooLarge(f"the file has {len(given.data)} bytes but may have {most}")
    create = partial(
        state.files.create, bytes(given.data), name=given.file_name, owner=caller.actor, tenant=caller.tenant
    )
    file = await state.storing.run(create)
    request.state.target = file.id
    return _reply(file)


@router.get("", response_model=Page[FileReply])
async def list_files(
    state: StateDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: After = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> Any:
    """By age, the newest first unless `order` says otherwise."""
    files = [file for file in await state.storing.run(state.files.all) if is_theirs(caller, file)]
    if purpose not in (None, PURPOSE):
        files = []
    if order == "asc":
        files.reverse()
        files = [file for file in files if after is None or file.id > after]
    else:
        files = [file for file in files if after is None or file.id < after]
    return paged([_reply(file) for file in files], limit)


@router.get("/{file}", response_model=FileReply)
async def retrieve_file(file: FileDep) -> Any:
    return _reply(file)


@router.get(
    "/{file}/content",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
async def retrieve_file_content(file: FileDep, state: StateDep) -> Response:
    """The file, byte for byte as it was uploaded."""
    data = await state.storing.run(partial(state.files.read, file.id))
    # NOTE: a type that no browser shows, and no name of the client's: the content is anybody's.
    headers = {"Content-Disposition": f'attachment; filename="{file.id}.jsonl"', "X-Content-Type-Options": "nosniff"}
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.delete("/{file}", response_model=FileDeleted)
async def delete_file(file: FileDep, state: StateDep) -> Any:
    """Jobs that were created with it keep what they need."""
    await state.storing.run(partial(state.files.delete, file.id))
    return {"id": file.id, "object": "file", "deleted": True}


def _reply(file: TrainingFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.name,
        "purpose": PURPOSE,
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }
