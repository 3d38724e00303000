"""Checks that go wrong as those on a GPU may, for tests of how checks are run.

Their processes import this module, so that it imports little.
"""

import itertools
import os
import time

import torch

from bench.gpu.clock import Deadline
from tests.gpu import processes
from tests.limits import HUNG


class Ending(Deadline):
    """A deadline that has passed once so many checks have begun; never in their own processes."""

    def __init__(self, checks: int) -> None:
        super().__init__(0.0)
        self._asked, self._checks = itertools.count(), checks

    def passed(self) -> bool:
        return next(self._asked) >= self._checks

    def __reduce__(self) -> tuple[type[Deadline], tuple[float]]:
        return Deadline, (HUNG,)


def dies(*_: object) -> str:
    """What a kernel that takes its process along looks like from outside."""
    os.abort()


def hangs(*_: object) -> str:
    time.sleep(100 * HUNG)
    return "late"


def loses_the_device(*_: object) -> str:
    """What an illegal access is to its process: from then on every call of CUDA fails."""
    processes.usable = lambda device: False
    raise RuntimeError("an illegal memory access was encountered")


def has_a_device(device: torch.device, *_: object) -> str:
    if not processes.usable(device):
        raise RuntimeError("an illegal memory access was encountered")
    return "the device works"
