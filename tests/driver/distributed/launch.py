"""Starts ranks as torchrun does: by the function behind that command, in forks of this process."""

import os
import sys
from collections.abc import Callable

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.forks import Ended, forked


def ranked(size: int, call: Callable[[], int | None]) -> Ended:
    """Calls a function in `size` ranks, each of which ends with the exit code that it returns.

    Returns:
        How the process that started them ended, with the output of all.
    """

    def rank() -> None:
        if code := call():
            sys.exit(code)

    def start() -> int:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            start_method="fork",
            max_restarts=0,
        )
        try:
            elastic_launch(config, rank)()
        except ChildFailedError as error:  # torchrun prints it, too
            print(error, file=sys.stderr)
            return 1
        return 0

    return forked(start)
