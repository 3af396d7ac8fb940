"""Tasks, their versions and aliases: files and a log per task on disk, an immutable snapshot in memory."""

from app.registry.pin import Pin
from app.registry.reference import DEFAULT_ALIAS, Reference, parse_reference
from app.registry.registry import Published, Registry
from app.registry.store import Store
from app.registry.task import Alias, Task, Version

__all__ = [
    "DEFAULT_ALIAS",
    "Alias",
    "Pin",
    "Published",
    "Reference",
    "Registry",
    "Store",
    "Task",
    "Version",
    "parse_reference",
]
