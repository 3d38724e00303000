"""Arithmetic on tokens and their experts that needs no vLLM: masks, chunks, sums of outputs."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from reap_kernels.errors import PlanError

# Rows of (token, expert) that are computed at once, and the bytes that they may take in float32. A
# chunk holds up to about four tensors of this size: input, output, sum of ranks, product.
MOST_ROWS = 16_384
MOST_BYTES = 256 * 2**20


def lowest(dtype: torch.dtype) -> float:
    """What the logits and selection biases of removed experts become.

    It is finite, since kernels that choose the largest may take -inf for no expert at all, and
    small enough that softmax, sigmoid and softplus of it are exactly 0 and that two of them add up.
    """
    return torch.finfo(dtype).min / 4


def fewest(top_k: int, n_group: int, topk_group: int, size: int) -> int:
    """The fewest experts that a router can choose among, of each of its groups of `size`.

    A router with groups scores each by its two best experts, and the groups that it chooses must
    hold `top_k`: the rule of plans.
    """
    return top_k if n_group == 1 else max(min(2, size), -(-top_k // topk_group))


def check_removed(
    name: str, removed: Sequence[int], *, experts: int, top_k: int, n_group: int, topk_group: int
) -> None:
    """Checks that a router can choose among the experts that are left.

    Args:
        name: of the layer, for messages.
        removed: ids of removed experts.
        experts: E, of the whole layer.
        top_k: experts of a token.
        n_group: groups of equal size that the router chooses among; 1 without.
        topk_group: groups that are chosen for a token.

    Raises:
        PlanError: an id that the layer does not have or that is given twice, or too few are left.
    """
    unknown = [expert for expert in removed if not 0 <= expert < experts]
    if unknown or len(set(removed)) < len(removed):
        raise PlanError(
            f"layer {name}: experts {sorted(removed)[:8]} are to be removed, but it has experts "
            f"0..{experts - 1}, each once; give ids of this model"
        )
    size = experts // n_group
    needed = fewest(top_k, n_group, topk_group, size)
    for group in range(n_group):
        left = size - sum(expert // size == group for expert in removed)
        if left < needed:
            where = f" in group {group} of {n_group}" if n_group > 1 else ""
            raise PlanError(
                f"layer {name}: {left} experts are left{where}, but its router needs {needed}; "
                "remove fewer"
            )


def chunks(tokens: int, top_k: int, hidden: int, most_rows: int) -> Iterator[slice]:
    """Slices of tokens whose rows fit into `MOST_ROWS` and `MOST_BYTES`; one, if there are none.

    Args:
        tokens: of this step.
        top_k: rows of a token.
        hidden: width of a row.
        most_rows: what the layer's kernel can take at once.
    """
    limit = min(MOST_ROWS, MOST_BYTES // (4 * hidden), most_rows)
    length = max(1, limit // top_k)
    for start in range(0, max(tokens, 1), length):
        yield slice(start, min(start + length, tokens))


def combined(y: Tensor, weights: Tensor | None, tokens: int) -> Tensor:
    """The sum of weighted rows, in float32 before it is rounded to the dtype of the rows.

    Args:
        y: [tokens * k, H], the rows of each token together.
        weights: [tokens, k], or None for 1.
        tokens: how many there are.
    """
    own = y.view(tokens, -1, y.shape[-1])
    if weights is None:
        return own.sum(1, dtype=torch.float32).to(y.dtype)
    if y.dtype == torch.float32 and y.device.type == "cpu":
        # Has the bits of vLLM's kernel for CPUs, in a third of the time of the below.
        return torch.bmm(weights.float().unsqueeze(1), own).squeeze(1)
    return (own.float() * weights.float().unsqueeze(-1)).sum(1).to(y.dtype)
