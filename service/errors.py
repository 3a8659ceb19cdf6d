"""The errors a caller may meet, each knowing its two codes.

    QuintetError
    ├── BadInput                400  INVALID_ARGUMENT
    │   ├── UnreadableImage
    │   └── TooManyPixels
    ├── Unauthenticated         401  UNAUTHENTICATED
    ├── Forbidden               403  PERMISSION_DENIED
    ├── NotFound                404  NOT_FOUND
    ├── WrongMethod             405  UNIMPLEMENTED
    ├── BodyTooLarge            413  RESOURCE_EXHAUSTED
    ├── UnsupportedMediaType    415  INVALID_ARGUMENT
    ├── Overloaded              429  RESOURCE_EXHAUSTED   (Retry-After)
    ├── Unavailable             503  UNAVAILABLE          (Retry-After)
    ├── NotSupported            501  UNIMPLEMENTED
    ├── DeadlineExceeded        504  DEADLINE_EXCEEDED
    └── InternalError           500  INTERNAL             (an id that the log has too)

A message says what is wrong and what would be right. It never holds a path, a
stack or an internal name, because it is shown to strangers.
"""

import secrets
from http import HTTPStatus
from typing import ClassVar


class QuintetError(Exception):
    """Base of every error that has an answer for the caller."""

    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    grpc_status: ClassVar[str] = "INTERNAL"
    title: ClassVar[str] = "Internal error"
    retry_after_seconds: int | None = None
    rejection: ClassVar[str | None] = None
    """The reason in `quintet_rejected_total`, for errors that refuse rather than fail."""

    def __init__(self, detail: str, *, index: int | None = None) -> None:
        """Say what is wrong in `detail`, and in `index` which of several inputs it is."""
        super().__init__(detail)
        self.detail = detail
        self.index = index


class BadInput(QuintetError):
    """The caller can mend this by sending something else."""

    status = HTTPStatus.BAD_REQUEST
    grpc_status = "INVALID_ARGUMENT"
    title = "Bad input"


class UnreadableImage(BadInput):
    """The bytes are not a picture that we can open."""

    title = "Unreadable image"


class TooManyPixels(BadInput):
    """The picture is larger than we are willing to decode."""

    title = "Too many pixels"
    rejection = "too_many_pixels"


class Unauthenticated(QuintetError):
    """No key, or a wrong one, where keys are set."""

    status = HTTPStatus.UNAUTHORIZED
    grpc_status = "UNAUTHENTICATED"
    title = "Unauthenticated"
    rejection = "unauthenticated"


class Forbidden(QuintetError):
    """An admin call without the admin key."""

    status = HTTPStatus.FORBIDDEN
    grpc_status = "PERMISSION_DENIED"
    title = "Forbidden"
    rejection = "forbidden"


class NotFound(QuintetError):
    """No such model, version or path."""

    status = HTTPStatus.NOT_FOUND
    grpc_status = "NOT_FOUND"
    title = "Not found"


class WrongMethod(QuintetError):
    """The path exists, for another method."""

    status = HTTPStatus.METHOD_NOT_ALLOWED
    grpc_status = "UNIMPLEMENTED"
    title = "Wrong method"

    def __init__(self, detail: str, *, allow: str) -> None:
        """Name the methods that the path answers in `allow`."""
        super().__init__(detail)
        self.allow = allow


class BodyTooLarge(QuintetError):
    """The body is over the limit, as sent or once decompressed."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    grpc_status = "RESOURCE_EXHAUSTED"
    title = "Body too large"
    rejection = "body_too_large"


class UnsupportedMediaType(QuintetError):
    """The body is of a kind that this call does not take."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    grpc_status = "INVALID_ARGUMENT"
    title = "Unsupported media type"


class Overloaded(QuintetError):
    """The queue is full: refused at once, rather than kept waiting."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    grpc_status = "RESOURCE_EXHAUSTED"
    title = "Too many requests"
    rejection = "queue_full"

    def __init__(self, detail: str, *, retry_after_seconds: int = 1) -> None:
        """Say in `retry_after_seconds` when there should be room again."""
        super().__init__(detail)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(QuintetError):
    """Starting, draining, or the model is not loaded."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    grpc_status = "UNAVAILABLE"
    title = "Unavailable"
    rejection = "unavailable"
    retry_after_seconds = 1


class NotSupported(QuintetError):
    """A part of the Open Inference Protocol's extensions that this service does not offer."""

    status = HTTPStatus.NOT_IMPLEMENTED
    grpc_status = "UNIMPLEMENTED"
    title = "Not supported"


class DeadlineExceeded(QuintetError):
    """The caller's deadline passed before its work started or ended."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    grpc_status = "DEADLINE_EXCEEDED"
    title = "Deadline exceeded"
    rejection = "deadline"


class InternalError(QuintetError):
    """Our fault. `detail` carries the id under which the log tells the rest."""

    def __init__(self, *, index: int | None = None) -> None:
        self.id = secrets.token_hex(6)
        super().__init__(f"Something failed on our side; the log has it under id {self.id}.", index=index)
