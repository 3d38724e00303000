"""The closed set of errors reap-kernels raises on purpose.

Every message names the input, the value found and the remedy. Anything else that escapes is a bug.

Example:
    >>> try:
    ...     rk.LayerStats(num_experts=0)
    ... except rk.errors.ReapError as error:
    ...     print(type(error).__name__)
    ShapeError
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


class ReapError(Exception):
    """Base of every deliberate error; the command line ends with its `exit_code` (3: bad input).

    `known` holds what a job had found out by then, as JSON values: the arithmetic of an estimate
    that ends early.
    """

    exit_code = 3
    known: Mapping[str, Any] = MappingProxyType({})


class UsageError(ReapError, TypeError):
    """A function of the Python API was called with an argument it cannot take, or where the call
    would have no effect.
    """


class ShapeError(ReapError):
    """A tensor's shape (or a size derived from it) does not fit the operation."""


class DtypeError(ReapError):
    """A tensor's dtype does not fit the operation."""


class BackendUnavailable(ReapError):
    """The backend asked for cannot serve this call; the message carries its reason."""

    exit_code = 4


class KernelError(ReapError):
    """A GPU refused to launch a kernel; the message names kernel, shape and CUDA's code."""

    exit_code = 4


class UnsupportedModel(ReapError):
    """The model cannot be observed or pruned correctly, so it is refused."""


class CheckpointError(ReapError):
    """A checkpoint on disk is missing, damaged, inconsistent, or cannot be written."""


class PlanError(ReapError):
    """A pruning plan is invalid or does not belong to the model."""


class DataError(ReapError):
    """Calibration data or recorded statistics are missing, malformed or not finite."""


class ResourceError(ReapError):
    """The machine ran out of disk or memory; nothing half-written is left behind."""

    exit_code = 4
