"""Builds configurations without the texts that transformers formats on the way and drops."""

import contextlib
from collections.abc import Iterator

from transformers import GenerationConfig, PretrainedConfig

from reap_driver.compat.replacement import LIBRARY


@contextlib.contextmanager
def without_texts() -> Iterator[None]:
    """Inside, the text of a configuration, of a model or of generation, is the name of its class.

    `from_dict` formats the whole configuration for a log message, whether or not it is logged. The
    check that a field is a dictionary or a configuration formats the configuration for the error of
    the alternative that did not fit. Every such text builds the default configuration of the class,
    with all nested ones, which are checked and formatted in turn: two thirds of the time that
    reading the config.json of a model of several parts took.
    """
    with LIBRARY:
        originals = {cls: cls.__repr__ for cls in (PretrainedConfig, GenerationConfig)}
        for cls in originals:
            cls.__repr__ = _name_of
        try:
            yield
        finally:
            for cls, original in originals.items():
                cls.__repr__ = original


def _name_of(config: object) -> str:
    return type(config).__name__
