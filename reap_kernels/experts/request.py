"""The request of a call that takes experts, from its inputs."""

from torch import Tensor

from reap_kernels.dispatch import Request, Sizes
from reap_kernels.types import ExpertWeights


def request_of(
    op: str, hidden: Tensor, top_k: int, experts: ExpertWeights, *, gram: bool = False
) -> Request:
    """The request of a call with these inputs; `gram`: whether it sums Gram matrices too."""
    sizes = Sizes(
        len(hidden), top_k, experts.num_experts, experts.hidden_size, experts.intermediate_size
    )
    return Request(
        op,
        hidden.device,
        hidden.dtype,
        experts.activation.kind,
        sizes,
        experts.layout,
        experts.biased,
        gram,
    )
