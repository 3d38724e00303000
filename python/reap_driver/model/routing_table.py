"""Tables that route a token by its id (DeepSeek-V4's `tid2eid`): values are expert ids, so pruning
rewrites them.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reap_kernels.errors import CheckpointError, PlanError

# Tables of expert ids by token: the one meaning of numbers inside a router that shapes cannot show
# (DeepSeek-V4).
ID_TABLES = frozenset({"tid2eid"})


def relabel(
    table: npt.NDArray[np.integer],
    kept: Sequence[int],
    num_experts: int,
    *,
    first_row: int,
    where: str,
) -> npt.NDArray[np.integer]:
    """Replace old expert ids by new ones.

    A kept expert gets its new number. A removed one is replaced by a kept expert that the row does
    not name yet, so a token still reaches as many different experts. Substitutes are spread evenly:
    the search starts at `(row + old id) mod kept`, which does not depend on how the table is cut
    into blocks.

    Args:
        table: [rows, k] old ids, a block of the whole table.
        kept: kept old ids, ascending.
        num_experts: number of old ids.
        first_row: row number of the block's first row in the whole table.
        where: names the tensor in an error.

    Returns:
        [rows, k] new ids, dtype of `table`.

    Raises:
        PlanError: fewer experts are kept than a row needs.
        CheckpointError: an id outside [0, num_experts).
    """
    rows, k = table.shape
    if k > len(kept):
        raise PlanError(
            f"{where}: routes a token to {k} experts, but the plan keeps {len(kept)}; keep at "
            f"least {k}."
        )
    if table.size and (table.min() < 0 or table.max() >= num_experts):
        bad = int(table[(table < 0) | (table >= num_experts)][0])
        raise CheckpointError(
            f"{where}: names expert {bad}, outside [0, {num_experts}); the checkpoint is damaged."
        )
    new_id = np.full(num_experts, -1, dtype=np.int64)
    new_id[np.asarray(kept)] = np.arange(len(kept))
    result = new_id[table]
    row = np.arange(first_row, first_row + rows)
    for slot in range(k):
        open_rows = np.flatnonzero(result[:, slot] < 0)
        candidate = (row[open_rows] + table[open_rows, slot]) % len(kept)
        for _ in range(k):  # a row names at most k - 1 others, so k tries suffice
            taken = (result[open_rows] == candidate[:, None]).any(axis=1)
            candidate = np.where(taken, (candidate + 1) % len(kept), candidate)
        result[open_rows, slot] = candidate
    return result.astype(table.dtype)
