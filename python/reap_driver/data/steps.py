"""Rendering of chat templates within a number of steps, as templates may come from anybody."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import TemplateRuntimeError

# Lines of a template run for one conversation. Real ones run some ten for a message.
LIMIT = 10_000_000
_FILE = "<template>"  # Jinja's name for the code of a template that comes from no file


@contextmanager
def limited_steps() -> Iterator[None]:
    """Inside it, a template that runs more than LIMIT of its lines ends with an error.

    Jinja's sandbox, in which transformers renders, limits a single `range` to 100,000 items, but
    neither loops in loops nor macros that call themselves twice. Lines are counted by Python's
    trace function, which leaves the environment as transformers made it. Memory is not limited.

    Raises:
        TemplateRuntimeError: a template took too many.
    """
    previous, left = sys.gettrace(), LIMIT

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            sys.settrace(previous)  # what Jinja does with the error is not counted
            raise TemplateRuntimeError(f"it takes more than {LIMIT:,} steps")
        return count

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        return count if frame.f_code.co_filename == _FILE else None

    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(previous)
