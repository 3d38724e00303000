"""Gram matrices of the experts' inner activations: what one layer sums for cutting and re-fitting
its down projections.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from reap_kernels.errors import ShapeError, UsageError


class LayerGram:
    """Per expert second and first moments of h, the input of the down projection.

    With h = act(gate x) * up x in R^I, g the router weight and s a factor of the token (1, or the
    weight of its calibration group), over the rows routed to the expert that count:

    | field | dtype, shape | value |
    |---|---|---|
    | `gram` | float32 [E, I, I] | sum s g^2 h h^T: the lower triangle; the rest is undefined |
    | `first` | float64 [E, I] | sum s g^2 h |
    | `weight` | float64 [E] | sum s g^2 |
    | `count` | int64 [E] | rows counted |

    For any matrix D, sum s g^2 ||D h||^2 is the trace of D A D^T with A the Gram matrix, so the
    error of any change of a down projection W is known without another pass over the data; and
    sum s g^2 f = W first + weight * bias, with f the expert's output. All fields add: `merge_` is
    observing both. The Gram matrices take E * I^2 * 4 bytes, see `nbytes_of`. A counted row of h
    that is NaN or infinite makes the sums of its expert so.

    Args:
        num_experts: E.
        intermediate_size: I, the width of an expert.
        device: where the tensors live.

    Raises:
        ShapeError: less than one expert or neuron.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> sums = rk.LayerGram(num_experts=2, intermediate_size=3)
        >>> sums.gram[1] += torch.tensor([[4.0, 0, 0], [2.0, 1.0, 0], [0.0, 0.0, 9.0]])
        >>> sums.second(1)
        tensor([[4., 2., 0.],
                [2., 1., 0.],
                [0., 0., 9.]], dtype=torch.float64)
    """

    def __init__(
        self, num_experts: int, intermediate_size: int, device: torch.device | str = "cpu"
    ) -> None:
        if num_experts < 1 or intermediate_size < 1:
            raise ShapeError(
                f"LayerGram needs at least one expert and one neuron, got {num_experts} experts "
                f"of {intermediate_size} neurons"
            )
        shape = (num_experts, intermediate_size)
        # Sums outlive the forward pass, so they are never inference tensors.
        with torch.inference_mode(False):
            self.gram = torch.zeros(*shape, intermediate_size, device=device, dtype=torch.float32)
            self.first = torch.zeros(shape, device=device, dtype=torch.float64)
            self.weight = torch.zeros(num_experts, device=device, dtype=torch.float64)
            self.count = torch.zeros(num_experts, device=device, dtype=torch.int64)

    @classmethod
    def from_packed(cls, packed: Sequence[Tensor]) -> "LayerGram":
        """Wraps the tensors of `packed()` without copying them."""
        self = cls.__new__(cls)
        self.gram, self.first, self.weight, self.count = packed
        return self

    def packed(self) -> list[Tensor]:
        """gram [E, I, I], first [E, I], weight [E], count [E], as kernels take them."""
        return [self.gram, self.first, self.weight, self.count]

    def __repr__(self) -> str:
        sizes = f"num_experts={self.num_experts}, intermediate_size={self.intermediate_size}"
        return f"LayerGram({sizes}, rows={int(self.count.sum())})"

    @property
    def num_experts(self) -> int:
        """E."""
        return self.gram.shape[0]

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self.gram.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.gram.device

    @staticmethod
    def nbytes_of(num_experts: int, intermediate_size: int) -> int:
        """Bytes of the sums of a layer with E experts of I neurons.

        Example:
            >>> import reap_kernels as rk
            >>> rk.LayerGram.nbytes_of(128, 768)  # a layer of Qwen3-30B-A3B
            302778368
        """
        return num_experts * (4 * intermediate_size**2 + 8 * intermediate_size + 16)

    def second(self, expert: int) -> Tensor:
        """The Gram matrix of one expert, symmetric: [I, I] float64, a copy.

        Raises:
            UsageError: there is no such expert.
        """
        if not 0 <= expert < self.num_experts:
            raise UsageError(f"expert {expert} leaves 0..{self.num_experts - 1}; give one of them")
        lower = self.gram[expert].double().tril_()
        return lower + lower.tril(-1).T

    def merge_(self, other: "LayerGram") -> "LayerGram":
        """Adds another layer's sums in place.

        Raises:
            ShapeError: different numbers of experts or neurons.
        """
        if other.gram.shape != self.gram.shape:
            raise ShapeError(
                f"cannot merge sums of {other.num_experts} experts of {other.intermediate_size} "
                f"neurons into {self.num_experts} of {self.intermediate_size}; both must be of one "
                "layer"
            )
        for mine, theirs in zip(self.packed(), other.packed(), strict=True):
            mine.add_(theirs.to(self.device))
        return self

    def to(self, device: torch.device | str) -> "LayerGram":
        """A copy on `device`."""
        with torch.inference_mode(False):
            return LayerGram.from_packed([t.to(device, copy=True) for t in self.packed()])
