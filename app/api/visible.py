"""What a caller may not know of is not there: the reply is that of a name which nobody has."""

from __future__ import annotations

from app.access import Caller
from app.registry.reference import not_found, parse_reference


def check_task(caller: Caller, name: str) -> None:
    """Raises ReferenceNotFound."""
    if not caller.sees(name):
        raise not_found()


def check_reference(caller: Caller, reference: str | None, base_name: str) -> None:
    """The same for a reference; None is the bare base model, which has a name of its own."""
    if reference is None or reference == base_name:
        check_task(caller, base_name)
    else:
        check_task(caller, parse_reference(reference).task)
