"""Reference Gram matrices in float64, from the formula: per expert, sums over its rows."""

from torch import Tensor

from reap_kernels.layer_gram import LayerGram
from reap_kernels.types import Routing


def gram(h: Tensor, routing: Routing, factors: Tensor, sums: LayerGram) -> None:
    """See `reap_kernels.gram.op.gram`; `factors` as `row_factors` returns them."""
    bounds = routing.offsets.tolist()
    factor = factors.reshape(-1)[routing.gather_index]
    for expert in range(sums.num_experts):
        rows = slice(bounds[expert], bounds[expert + 1])
        counted = factor[rows] != 0
        inner, weight = h[rows][counted].double(), factor[rows][counted].square()
        weighted = inner * weight[:, None]
        sums.gram[expert] += weighted.T @ inner
        sums.first[expert] += weighted.sum(dim=0)
        sums.weight[expert] += weight.sum()
        sums.count[expert] += int(counted.sum())
