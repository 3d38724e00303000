"""Builds configurations without the texts that transformers formats on the way and drops."""

import contextlib
import threading
from collections.abc import Iterator

from transformers import PretrainedConfig

_LOCK = threading.RLock()  # the method is replaced for all threads


@contextlib.contextmanager
def without_texts() -> Iterator[None]:
    """Inside, the text of a configuration is the name of its class.

    `from_dict` formats the whole configuration for a log message, whether or not it is logged. The
    check that a field is a dictionary or a configuration formats the configuration for the error of
    the alternative that did not fit. Every such text builds the default configuration of the class,
    with all nested ones, which are checked and formatted in turn: two thirds of the time that
    reading the config.json of a model of several parts took.
    """
    with _LOCK:
        original = PretrainedConfig.__repr__
        PretrainedConfig.__repr__ = _name_of  # type: ignore[method-assign]
        try:
            yield
        finally:
            PretrainedConfig.__repr__ = original  # type: ignore[method-assign]


def _name_of(config: PretrainedConfig) -> str:
    return type(config).__name__
