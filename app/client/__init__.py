"""A client of the HTTP API, synchronous and asynchronous: typed results, one error tree, retries, streams."""

from app.client.async_client import AsyncClient
from app.client.client import Client
from app.client.errors import (
    BadRequest,
    ClientError,
    Conflict,
    ConnectionFailed,
    DigestMismatch,
    InvalidReply,
    NotAllowed,
    NotAuthenticated,
    NotFound,
    RateLimited,
    ReplyError,
    ServerFailed,
    StreamCut,
    TimedOut,
    Unavailable,
)
from app.client.retries import Retries
from app.client.stream import AsyncStream, Stream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "BadRequest",
    "Client",
    "ClientError",
    "Conflict",
    "ConnectionFailed",
    "DigestMismatch",
    "InvalidReply",
    "NotAllowed",
    "NotAuthenticated",
    "NotFound",
    "RateLimited",
    "ReplyError",
    "Retries",
    "ServerFailed",
    "Stream",
    "StreamCut",
    "TimedOut",
    "Unavailable",
]
