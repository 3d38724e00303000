"""Constants that can stand for removed experts, as in MoNE."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reap_kernels import LayerGram
from reap_kernels.errors import ShapeError


def expert_constants(
    down: Tensor | Sequence[Tensor], sums: LayerGram, down_bias: Tensor | None = None
) -> Tensor:
    """The constant output of each expert that is nearest to its outputs: sum g^2 f / sum g^2.

    Args:
        down: [E, H, I], stacked or one [H, I] per expert.
        sums: of the layer.
        down_bias: [E, H], or None.

    Returns:
        float64 [E, H] on the device of `sums`; 0 for experts without rows.

    Raises:
        ShapeError: the shapes do not fit each other.

    Example:
        >>> import torch
        >>> from reap_kernels import LayerGram
        >>> sums = LayerGram(1, 2)
        >>> sums.first[0], sums.weight[0] = torch.tensor([2.0, 4.0]), 2.0
        >>> expert_constants(torch.eye(2)[None], sums)
        tensor([[1., 2.]], dtype=torch.float64)
    """
    shapes = [tuple(matrix.shape[1:]) for matrix in down]
    if shapes != [(sums.intermediate_size,)] * sums.num_experts:
        raise ShapeError(
            f"down has {len(down)} matrices with {sorted(set(shapes))} columns; these sums are of "
            f"{sums.num_experts} experts of {sums.intermediate_size} neurons: give those of one "
            "layer"
        )
    mean = sums.first / torch.where(sums.weight > 0, sums.weight, 1.0)[:, None]
    constants = torch.stack(
        [matrix.detach().to(mean) @ row for matrix, row in zip(down, mean, strict=True)]
    )
    if down_bias is not None:
        constants += down_bias.detach().to(mean) * (sums.weight > 0)[:, None]
    return constants
