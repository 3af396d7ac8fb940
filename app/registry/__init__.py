"""Tasks, their versions and aliases: files and a log per task on disk, an immutable snapshot in memory."""

from app.registry.alias import Alias, Target
from app.registry.changes import ANY_ETAG
from app.registry.log import MAX_SPLIT, Entry
from app.registry.pin import Pin
from app.registry.reference import DEFAULT_ALIAS, Reference, parse_reference
from app.registry.registry import Published, Registry
from app.registry.store import Store
from app.registry.task import DeletedVersion, Task, Version

__all__ = [
    "ANY_ETAG",
    "DEFAULT_ALIAS",
    "MAX_SPLIT",
    "Alias",
    "DeletedVersion",
    "Entry",
    "Pin",
    "Published",
    "Reference",
    "Registry",
    "Store",
    "Target",
    "Task",
    "Version",
    "parse_reference",
]
