"""Importing this checks torch, so that a missing or an old one is named with the remedy at once.

It is imported before anything that imports torch.
"""

import importlib.util
import re

OLDEST_TORCH = (2, 10)  # as core/pyproject.toml says, with the reason
INSTALL_TORCH = (
    "run `pip install 'torch>={}'`, on a machine without a GPU with `--index-url "
    "https://download.pytorch.org/whl/cpu`"
).format(".".join(map(str, OLDEST_TORCH)))


def check_torch() -> None:
    """Checks the torch that is installed.

    Raises:
        ImportError: there is none, or an older one, with the remedy.
    """
    oldest = ".".join(map(str, OLDEST_TORCH))
    if importlib.util.find_spec("torch") is None:
        raise ImportError(
            f"reap_kernels needs torch {oldest} or newer, which is not installed; {INSTALL_TORCH}"
        )
    import torch

    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is not None and (int(found[1]), int(found[2])) < OLDEST_TORCH:
        raise ImportError(
            f"reap_kernels needs torch {oldest} or newer, this is {torch.__version__}; "
            f"{INSTALL_TORCH}"
        )


check_torch()
