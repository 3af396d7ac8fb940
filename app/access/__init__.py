"""Who may do what: keys with scopes, limits and quotas, and the log of what was done. Knows nothing of HTTP."""

from app.access.access import Access
from app.access.audit import AuditEntry
from app.access.caller import Caller
from app.access.database import Database
from app.access.key import Key, Limits, Scope
from app.access.key_store import KeyStore
from app.access.place import Place

__all__ = ["Access", "AuditEntry", "Caller", "Database", "Key", "KeyStore", "Limits", "Place", "Scope"]
