"""Replaces a name of a library's module for the time of a block."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

# Held while a model is built or loaded: transformers and this project then replace functions for
# all threads. Were two threads inside at once, the first to leave would restore what is the
# library's own, and the second what the first had put there, for good.
LIBRARY = threading.RLock()


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `module` has another value under `name`; afterwards it has its own again."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
