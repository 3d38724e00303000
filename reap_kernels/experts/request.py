"""The request of a call that takes experts, from its inputs."""

from torch import Tensor

from reap_kernels.dispatch import Request, Sizes
from reap_kernels.quantized import Quantized
from reap_kernels.types import ExpertWeights, Matrices


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
        _boxes(experts),
        _block(experts.down),
    )


def _block(matrices: Matrices) -> tuple[int, int] | None:
    """See `Request.block`: all of the experts' matrices have the same."""
    if isinstance(matrices, Quantized) and matrices.format == "fp8_block":
        return matrices.block
    return None


def boxed(matrices: Tensor) -> bool:
    """Whether TMA reads boxes of a tensor: its rows are contiguous, and its address and all other
    strides are multiples of 16 bytes.
    """
    size, (*outer, last) = matrices.element_size(), matrices.stride()
    aligned = all(stride * size % 16 == 0 for stride in outer)
    return last == 1 and aligned and matrices.data_ptr() % 16 == 0


def _boxes(experts: ExpertWeights) -> str:
    """See `Request.boxes`. Of separate tensors only the first is looked at: the others have its
    strides, and to ask all their addresses takes longer than a launch.
    """
    if experts.layout == "mixed":
        return ""
    if experts.layout == "quantized":  # dequantized into one tensor
        read = True
    else:
        parts = (m for m in (experts.up, experts.gate, experts.down) if m is not None)
        read = all(boxed(m if isinstance(m, Tensor) else m[0]) for m in parts)
    if not read:
        return ""
    stacks = [m for m in (experts.up, experts.down) if isinstance(m, Tensor)]
    shared = any(stack.stride(0) == 0 for stack in stacks)  # one matrix for all experts
    if experts.gate is not None or experts.layout == "table" or shared:
        return "apart"
    return "interleaved" if experts.interleaved else "fused"
