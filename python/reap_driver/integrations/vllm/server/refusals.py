"""What a route answers in place of a result: a status and one sentence, never a traceback."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from reap_kernels.errors import (
    BackendUnavailable,
    CheckpointError,
    DataError,
    KernelError,
    PlanError,
    ReapError,
    ResourceError,
    UnsupportedModel,
    UsageError,
)

_KINDS: Mapping[int, str] = MappingProxyType(
    {
        401: "authentication_error",
        404: "not_found_error",
        409: "conflict_error",
        500: "internal_error",
        503: "service_unavailable_error",
        507: "insufficient_storage_error",
    }
)
# What is wrong with what was sent, and what this server cannot do, by the class of the error.
_STATUS: tuple[tuple[type[ReapError], int], ...] = (
    (UsageError, 400),
    (PlanError, 400),
    (DataError, 409),
    (UnsupportedModel, 409),
    (CheckpointError, 409),
    (BackendUnavailable, 409),
    (KernelError, 503),
    (ResourceError, 507),
)


class Refused(Exception):
    """A request that is answered with an error. What the library refuses is a `ReapError`.

    Attributes:
        status: of the answer, in HTTP.

    Example:
        >>> Refused(409, "nothing was observed yet; start, and send requests").status
        409
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: ReapError | Refused) -> int:
    """The status by which an error is answered."""
    if isinstance(error, Refused):
        return error.status
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 409)


def status_named(name: str) -> int:
    """The status for the name of a class of errors, as workers report it; 503 for any other."""
    return next((status for kind, status in _STATUS if kind.__name__ == name), 503)


def envelope(status: int, message: str) -> dict[str, Any]:
    """The body of an error, as vLLM's own routes have it.

    Example:
        >>> envelope(401, "give a key")["error"]["type"]
        'authentication_error'
    """
    kind = _KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "code": status}}
