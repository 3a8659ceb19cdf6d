"""All that can go wrong in asking a service, whichever protocol it is asked in.

    QuintetError
    ├── BadInput               400  INVALID_ARGUMENT    send something else; `index` says which input
    ├── Unauthenticated        401  UNAUTHENTICATED
    ├── Forbidden              403  PERMISSION_DENIED
    ├── NotFound               404  NOT_FOUND
    ├── TooLarge               413  RESOURCE_EXHAUSTED
    ├── UnsupportedMediaType   415
    ├── Overloaded             429  RESOURCE_EXHAUSTED  tried again
    ├── Unavailable            503  UNAVAILABLE         tried again; also: no connection
    ├── DeadlineExceeded       504  DEADLINE_EXCEEDED   also: no answer in time
    ├── Untrusted                                       a certificate that this machine does not trust
    └── ServerError            500  INTERNAL            also: an answer that makes no sense

The message is the service's own sentence where it gave one, and else says the cause and the cure.
"""

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime


class QuintetError(Exception):
    """Base of every error of this package.

    Attributes:
        index: Which of several inputs is at fault, from 0, where one is.
        retry_after: Seconds the service asks to be left alone, where it does.
    """

    def __init__(self, detail: str, *, index: int | None = None, retry_after: float | None = None) -> None:
        """Say what is wrong in `detail`."""
        super().__init__(detail)
        self.index = index
        self.retry_after = retry_after


class BadInput(QuintetError):
    """An input is not what the model takes; the same again will fail again."""


class Unauthenticated(QuintetError):
    """The service wants a key, and got none or a wrong one."""


class Forbidden(QuintetError):
    """The key does not open this door."""


class NotFound(QuintetError):
    """The service has no such model or path."""


class TooLarge(QuintetError):
    """The request is larger than the service takes: send fewer inputs at a time, or smaller ones."""


class UnsupportedMediaType(QuintetError):
    """The service does not take this kind of body."""


class Overloaded(QuintetError):
    """The service has more work than it can take, and still had at the last try."""


class Unavailable(QuintetError):
    """No service answers there, or it is starting, draining, or without this model."""


class DeadlineExceeded(QuintetError):
    """No answer came in the time that the caller gave."""


class Untrusted(QuintetError):
    """The service's certificate was signed by nobody whom this machine trusts."""


class ServerError(QuintetError):
    """The service failed, or is not one that this client understands."""


_BY_STATUS: dict[int, type[QuintetError]] = {
    400: BadInput,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    405: NotFound,
    413: TooLarge,
    415: UnsupportedMediaType,
    422: BadInput,
    429: Overloaded,
    503: Unavailable,
    504: DeadlineExceeded,
}

_BY_CODE: dict[str, type[QuintetError]] = {
    "INVALID_ARGUMENT": BadInput,
    "OUT_OF_RANGE": BadInput,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": Forbidden,
    "NOT_FOUND": NotFound,
    "UNIMPLEMENTED": NotFound,
    "RESOURCE_EXHAUSTED": TooLarge,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
}


def from_http(status: int, headers: Mapping[str, str], body: bytes) -> QuintetError:
    """Name the error in an HTTP answer; `headers` are looked up in lower case."""
    try:
        problem = json.loads(body)
    except ValueError:  # a proxy's page, say: its status tells more than its text
        problem = None
    detail = index = None
    if isinstance(problem, dict):
        detail = problem.get("detail")
        index = problem.get("index")
    return _BY_STATUS.get(status, ServerError)(
        detail if isinstance(detail, str) and detail else f"The server answered with HTTP status {status}.",
        index=index if isinstance(index, int) else None,
        retry_after=_seconds(headers.get("retry-after")),
    )


def from_grpc(code: str, details: str | None, trailers: Mapping[str, str]) -> QuintetError:
    """Name the error in a gRPC status and its trailing metadata.

    RESOURCE_EXHAUSTED stands for a full queue and for a large body alike. Only the
    first passes with time, so only the first comes with a time to wait.
    """
    retry_after = _seconds(trailers.get("retry-after"))
    kind = _BY_CODE.get(code, ServerError)
    if kind is TooLarge and retry_after is not None:
        kind = Overloaded
    index = trailers.get("index", "")
    return kind(
        details or f"The server answered with gRPC status {code}.",
        index=int(index) if index.isdecimal() else None,
        retry_after=retry_after,
    )


def _seconds(retry_after: str | None) -> float | None:
    """Read `Retry-After`: a number of seconds, or a date (RFC 9110, section 10.2.3)."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        moment = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return max(0.0, (moment - datetime.now(timezone.utc)).total_seconds())


def unreachable(url: str, reason: str) -> QuintetError:
    """Name a connection that could not be made, or broke off, by what a library says of it."""
    lower = reason.lower()
    if "certificate" in lower and "verify" in lower:
        return Untrusted(
            f"The certificate of {url} is signed by nobody whom this machine trusts; "
            "if it is yours, name it (or its authority's) as ca_file."
        )
    if "wrong_version_number" in lower or "record layer failure" in lower:
        return ServerError(f"What answers at {url} speaks no TLS; ask it by http:// or grpc://.")
    if "illegal" in lower or "http1" in lower or "http/1" in lower or "http_1" in lower or "http2" in lower:
        return ServerError(
            f"What answers at {url} speaks another protocol; "
            "http:// is for the REST port (3000), grpc:// for the gRPC port (3001)."
        )
    if any(words in lower for words in ("refused", "failed to connect", "attempts failed", "unreachable")):
        cause = "nothing listens there"
    elif "name" in lower or "nodename" in lower or "dns" in lower or "resol" in lower:
        cause = "there is no machine of that name"
    else:
        return Unavailable(f"The connection to {url} broke off; the service may have stopped ({reason}).")
    return Unavailable(f"No service answers at {url}: {cause}; start one, or mend the address.")


def too_late(url: str, seconds: float) -> DeadlineExceeded:
    """Name the silence of a service."""
    return DeadlineExceeded(
        f"{url} did not answer within {seconds:.3g} s; give it longer (timeout), or less to do at a time."
    )
