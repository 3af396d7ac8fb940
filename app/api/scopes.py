"""What each route needs, by its name. A route that is not here is refused to everyone."""

from __future__ import annotations

from typing import Final, Literal

from app.access import Scope

PUBLIC: Final = "public"  # no key
ANY_KEY: Final = "any key"

NEEDS: dict[str, Scope | Literal["public", "any key"]] = {
    "livez": PUBLIC,
    "readyz": PUBLIC,
    "health": PUBLIC,
    "version": PUBLIC,
    "custom_swagger_ui_html": PUBLIC,
    "swagger_ui_redirect": PUBLIC,
    "info": ANY_KEY,
    "list_models": ANY_KEY,
    "get_model": ANY_KEY,
    "generate": "generate",
    "classify": "generate",
    "create_completion": "generate",
    "create_chat_completion": "generate",
    "tokenize": "generate",
    "detokenize": "generate",
    "list_tasks": "prompts:read",
    "get_task": "prompts:read",
    "list_versions": "prompts:read",
    "get_version": "prompts:read",
    "get_file": "prompts:read",
    "inspect_version": "prompts:read",
    "get_alias": "prompts:read",
    "get_history": "prompts:read",
    "publish_version": "prompts:write",  # and aliases:write to move another alias than `latest`
    "delete_version": "prompts:write",
    "restore_version": "prompts:write",
    "delete_task": "prompts:write",
    "put_alias": "aliases:write",
    "delete_alias": "aliases:write",
    "roll_back_alias": "aliases:write",
    "create_file": "jobs",
    "list_files": "jobs",
    "retrieve_file": "jobs",
    "retrieve_file_content": "jobs",
    "delete_file": "jobs",
    "create_fine_tuning_job": "jobs",  # and aliases:write to move another alias than `latest`
    "list_fine_tuning_jobs": "jobs",
    "retrieve_fine_tuning_job": "jobs",
    "list_fine_tuning_events": "jobs",
    "list_fine_tuning_checkpoints": "jobs",
    "retrieve_fine_tuning_report": "jobs",
    "cancel_fine_tuning_job": "jobs",
    "pause_fine_tuning_job": "jobs",
    "resume_fine_tuning_job": "jobs",
    "list_audit": "admin",
    "metrics": "metrics",
}

# Those of starlette, which know no dependencies: the schema, and the files of its page.
PUBLIC_PATHS = {"/openapi.json", "/static-offline-docs"}
