"""Every error a user can meet, as one tree. A leaf fixes the HTTP status and the machine-readable code.

* SoftpromptError
  + RequestError
    - InvalidRequest          400  a parameter is wrong; `param` names it
    - ContextLengthExceeded   400  virtual tokens + text + answer do not fit
    - AuthenticationRequired  401  no key, or one that is unknown, expired or revoked
    - PermissionDenied        403  the key lacks a scope
    - ReferenceNotFound       404  unknown task, version, alias or file
    - RequestTimeout          408  the client sends too slowly
    - PreconditionFailed      412  an If-Match is stale, or an alias still names the version
    - BodyTooLarge            413
    - UnsupportedMediaType    415
    - InvalidPromptFile       422  `code` names the cause
    - InvalidTrainingData     422
    - InvalidRecipe           422
    - PreconditionRequired    428
    - RateLimited             429  the caller's own limit
    - HeadTooLarge            431
  + ServerError
    - NumericalError          500  this request's logits were not finite
    - EngineFailed            500  the engine could not finish this request
    - TrainingFailed          500
    - InvalidBaseModel        500  the base model cannot be found, read or served
    - InvalidSettings         500  the environment or the command line is wrong
    - Overloaded              503  no room in the queue
    - NotReady                503  starting, draining or stopped
    - PromptCorrupt           503  stored files no longer match their digest
    - RequestTimedOut         504  not ready when its time was over
    - StorageFull             507
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class SoftpromptError(Exception):
    """Base of the tree: `status` is the HTTP status, `code` the machine-readable cause."""

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"
    code: str = "internal_error"
    headers: ClassVar[Mapping[str, str]] = {}
    retry_after: int | None = None  # seconds, sent as Retry-After

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class RequestError(SoftpromptError):
    """The caller can mend it."""

    status = 400
    title = "Bad request"
    code = "invalid_request"


class InvalidRequest(RequestError):
    """A parameter is missing, of the wrong type or out of its range."""


class ContextLengthExceeded(RequestError):
    title = "Context length exceeded"
    code = "context_length_exceeded"


class AuthenticationRequired(RequestError):
    """One message for every cause: a stranger learns nothing about a key."""

    status = 401
    title = "Authentication required"
    code = "invalid_api_key"
    headers = {"WWW-Authenticate": "Bearer"}


class PermissionDenied(RequestError):
    status = 403
    title = "Permission denied"
    code = "permission_denied"


class ReferenceNotFound(RequestError):
    """Unknown and forbidden names look the same, and never fall back to the base model."""

    status = 404
    title = "Not found"
    code = "not_found"


class RequestTimeout(RequestError):
    """The request did not arrive in the time that it may take."""

    status = 408
    title = "Request timeout"
    code = "request_timeout"


class PreconditionFailed(RequestError):
    status = 412
    title = "Precondition failed"
    code = "precondition_failed"


class BodyTooLarge(RequestError):
    status = 413
    title = "Body too large"
    code = "body_too_large"


class UnsupportedMediaType(RequestError):
    status = 415
    title = "Unsupported media type"
    code = "unsupported_media_type"


class InvalidPromptFile(RequestError):
    """An uploaded checkpoint is refused; `code` names the cause, the message the value and the limit."""

    status = 422
    title = "Invalid prompt file"
    code = "invalid_prompt_file"


class InvalidTrainingData(RequestError):
    status = 422
    title = "Invalid training data"
    code = "invalid_training_data"


class InvalidRecipe(RequestError):
    status = 422
    title = "Invalid recipe"
    code = "invalid_recipe"


class PreconditionRequired(RequestError):
    status = 428
    title = "Precondition required"
    code = "precondition_required"


class RateLimited(RequestError):
    """`retry_after`: seconds after which the request would have been let in, had nobody else used the key."""

    status = 429
    title = "Too many requests"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class HeadTooLarge(RequestError):
    status = 431
    title = "Head too large"
    code = "head_too_large"


class ServerError(SoftpromptError):
    """Ours to mend."""


class NumericalError(ServerError):
    title = "Numerical error"
    code = "numerical_error"


class EngineFailed(ServerError):
    title = "Engine failed"
    code = "engine_failed"


class TrainingFailed(ServerError):
    title = "Training failed"
    code = "training_failed"


class InvalidBaseModel(ServerError):
    title = "Invalid base model"
    code = "invalid_base_model"


class InvalidSettings(ServerError):
    """One line per problem in the message."""

    title = "Invalid settings"
    code = "invalid_settings"


class Overloaded(ServerError):
    status = 503
    title = "Overloaded"
    code = "overloaded"
    retry_after = 1


class NotReady(ServerError):
    status = 503
    title = "Not ready"
    code = "not_ready"
    retry_after = 5


class PromptCorrupt(ServerError):
    status = 503
    title = "Prompt corrupt"
    code = "prompt_corrupt"


class RequestTimedOut(ServerError):
    """Its deadline has passed, in the queue or later; the client may have set it."""

    status = 504
    title = "Deadline exceeded"
    code = "deadline_exceeded"


class StorageFull(ServerError):
    status = 507
    title = "Storage full"
    code = "storage_full"
