"""CPU cross moments: each piece of inner activations is used while it is in cache, then dropped."""

from torch import Tensor

from reap_kernels.experts.cpu import add_product, inner_pieces, partition, summable
from reap_kernels.sort import cpu as sort_cpu
from reap_kernels.types import ExpertWeights


def cross(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: ExpertWeights,
    targets: Tensor,
    out: Tensor,
) -> None:
    """See `reap_kernels.cross.op.cross`; masked tokens have weights of 0. Products are float32,
    float64 for float64 inputs, and add in the order of the pieces: the same bits run to run.
    """
    routing = sort_cpu.sort_by_expert(topk_ids, topk_weights, experts.num_experts)
    parts = partition(routing.offsets)
    sizes = [rows for _, rows in parts]
    weights = topk_weights.reshape(-1)[routing.gather_index[: sum(sizes)]]
    found = inner_pieces(hidden, routing, experts, parts)
    for weight, (expert, tokens, h) in zip(weights.split(sizes), found, strict=True):
        rows = summable(h)
        rows.mul_(weight.to(rows.dtype)[:, None])
        target = targets.index_select(0, tokens).to(rows.dtype)
        add_product(out[expert], target.T, rows)
