"""Tables that map token ids to experts (DeepSeek-V4's `tid2eid`): pruning rewrites their values."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reap_kernels.errors import CheckpointError, PlanError

# Names of the tables (DeepSeek-V4): shapes do not show that the values of a tensor are expert ids.
ID_TABLES = frozenset({"tid2eid"})


def relabel(
    table: npt.NDArray[np.integer],
    kept: Sequence[int],
    num_experts: int,
    *,
    first_row: int,
    where: str,
) -> npt.NDArray[np.integer]:
    """Replaces old expert ids by new ones.

    The id of a kept expert becomes its new id. The id of a removed one becomes that of a kept
    expert that is not in the row yet, so a token still reaches as many different experts. The
    search for it starts at `(row + old id) mod kept`, which spreads the substitutes evenly and does
    not depend on how the table is divided into blocks.

    Args:
        table: [rows, k] old ids, a block of the whole table.
        kept: old ids of the kept experts, ascending.
        num_experts: number of experts before pruning.
        first_row: number of the block's first row in the whole table.
        where: name of the tensor, for error messages.

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
        for _ in range(k):  # a row has at most k - 1 other ids, so k tries suffice
            taken = (result[open_rows] == candidate[:, None]).any(axis=1)
            candidate = np.where(taken, (candidate + 1) % len(kept), candidate)
        result[open_rows, slot] = candidate
    return result.astype(table.dtype)
