"""Checks, before a command or a call begins, what is installed: reap_kernels, torch, transformers.

pip refuses what does not fit when it installs; later changes of one package it only warns of.
"""

import functools
import importlib
import importlib.util
import re
from importlib import metadata
from pathlib import Path
from typing import Any

# Of this package, and of the reap_kernels it goes with.
VERSION = "0.1.0"
# The first version, and the first that is too new, as pyproject.toml says, with the reason.
TRANSFORMERS = ((5, 17), (6,))
_KERNELS = "reap-kernels-core"


class Unmet(ImportError):
    """A package that is needed is missing, or its version does not fit; says what to install."""


@functools.cache
def check() -> None:
    """Checks the packages without which nothing runs.

    Raises:
        Unmet: one of them is missing or does not fit, with the remedy.
    """
    remedy = f"run `pip install {_KERNELS}=={VERSION}`, or `pip install -e .` in a clone"
    if importlib.util.find_spec("reap_kernels") is None:
        raise Unmet(f"reap_driver needs reap_kernels {VERSION}, which is not installed; {remedy}")
    try:
        kernels = importlib.import_module("reap_kernels")
    except ImportError as error:
        raise Unmet(f"reap_kernels cannot be imported: {error}") from error
    if kernels.__version__ != VERSION:
        raise Unmet(
            f"reap_driver {VERSION} needs reap_kernels {VERSION}, this is {kernels.__version__} in "
            f"{_folder('reap_kernels')}; {remedy}"
        )
    _check_transformers()


def _check_transformers() -> None:
    least, below = (".".join(map(str, version)) for version in TRANSFORMERS)
    wanted = f"reap_driver needs transformers {least} or newer, below {below}"
    remedy = f"run `pip install 'transformers>={least},<{below}'`"
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError as error:
        raise Unmet(f"{wanted}, which is not installed; {remedy}") from error
    release = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if not TRANSFORMERS[0] <= release < TRANSFORMERS[1]:
        raise Unmet(f"{wanted}, this is {version}; {remedy}")


def installation() -> dict[str, Any]:
    """Where both packages are, and which installed distributions have each.

    Returns:
        `reap_kernels` and `reap_driver`: folder and distributions of each (none where the sources
        are only on the path); `problems`: what is wrong with that, with the remedy.
    """
    owners = metadata.packages_distributions()
    found: dict[str, dict[str, Any]] = {
        name: {"folder": _folder(name), "distributions": sorted(set(owners.get(name, ())))}
        for name in ("reap_kernels", "reap_driver")
    }
    problems = [
        f"{name} is installed twice, by {' and '.join(facts['distributions'])}; run `pip uninstall "
        f"{' '.join(facts['distributions'])}` and install one again"
        for name, facts in found.items()
        if len(facts["distributions"]) > 1
    ]
    return {**found, "problems": problems}


def _folder(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    return str(Path(spec.origin).parent) if spec is not None and spec.origin else None
