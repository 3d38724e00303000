"""Rank 1 fails while the others wait for its statistics."""

import sys

from reap_driver.observation.data_parallel import ranks
from reap_kernels import LayerStats, SaliencyStats
from reap_kernels.errors import DataError, ReapError


def main() -> int:
    try:
        with ranks() as world:
            if world.rank == 1:
                raise DataError("the batch of rank 1 holds token id 7")
            world.merged(SaliencyStats({"layer": LayerStats(2)}, ["default"]))
    except ReapError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
