"""What is said where scipy, which merging alone needs, is not installed."""

import contextlib
from collections.abc import Iterator

from reap_kernels.errors import UsageError


@contextlib.contextmanager
def scipy_needed() -> Iterator[None]:
    """Around an import of scipy.

    Raises:
        UsageError: scipy is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            "merging experts needs scipy, which is not installed; run `pip install scipy`, or "
            "install reap-kernels with the extra `merging`"
        ) from error
