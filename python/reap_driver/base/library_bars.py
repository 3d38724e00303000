"""Turns off the progress bars of the libraries: transformers, huggingface_hub, datasets."""

import contextlib
import os
import sys
from collections.abc import Iterator

# What the libraries read when they are imported; tqdm, by which all of them draw, too.
_VARIABLES = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
# Module -> its functions that turn bars off and on again.
_SWITCHES = {
    "transformers.utils.logging": ("disable_progress_bar", "enable_progress_bar"),
    "huggingface_hub.utils": ("disable_progress_bars", "enable_progress_bars"),
    "datasets.utils": ("disable_progress_bars", "enable_progress_bars"),
}


@contextlib.contextmanager
def no_library_bars() -> Iterator[None]:
    """Inside the context no library shows a bar of its own.

    Libraries that are imported inside it show none afterwards either, so a process that goes on
    imports them first.
    """
    shown = [getattr(sys.modules[name], on) for name, (_, on) in _SWITCHES.items() if _shows(name)]
    before = {name: os.environ.get(name) for name in _VARIABLES}
    os.environ.update(dict.fromkeys(_VARIABLES, "1"))
    for name, (off, _) in _SWITCHES.items():
        if name in sys.modules:
            getattr(sys.modules[name], off)()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for switch_on in shown:
            switch_on()


def _shows(name: str) -> bool:
    """Whether a library that is imported shows its bars."""
    module = sys.modules.get(name)
    if module is None:
        return False
    if name.startswith("transformers"):
        return bool(module.is_progress_bar_enabled())
    return not module.are_progress_bars_disabled()
