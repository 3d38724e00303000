"""Expert parallelism of transformers, which puts whole experts on each rank.

Its tensors are DTensors sharded by expert, and ordinary local tensors while their module runs. Its
routers give local ids; a slot of another rank's expert has the number of local experts as its id,
and router weight 0. So the statistics of a rank are exactly those of its experts, and those of the
layer are their concatenation.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reap_kernels import LayerStats
from reap_kernels.errors import DataError


@dataclass(frozen=True)
class ExpertSlice:
    """The experts of one layer in this process.

    Attributes:
        first: global id of the first expert.
        count: number of experts, the same on every rank; rank r has those from r * count.
        mesh: the one-dimensional DeviceMesh of the ranks that hold the layer.
    """

    first: int
    count: int
    mesh: Any = field(repr=False, compare=False)

    def gathered(self, name: str, own: LayerStats) -> LayerStats:
        """Statistics of the whole layer, on the CPU, on every rank; every rank must call it.

        Args:
            name: name of the layer, for error messages.
            own: this rank's statistics, of `count` experts.

        Raises:
            DataError: on every rank, if ranks counted different tokens or groups because they got
                different batches.
        """
        groups = [int(number) for number in self._on_all(torch.tensor([own.num_groups]))]
        seen = [f"{number} groups" for number in groups]
        if len(set(groups)) == 1:
            counts, sums, extrema, tokens = (self._on_all(tensor) for tensor in own.packed())
            if all(torch.equal(counted, tokens[0]) for counted in tokens):
                whole = [torch.cat(parts, dim=-1) for parts in (counts, sums, extrema)]
                return LayerStats.from_packed([*whole, tokens[0]])
            seen = [f"{counted.tolist()} tokens" for counted in tokens]
        raise DataError(
            f"{name}: its expert-parallel ranks counted {', '.join(seen)}; give every rank the "
            "same batches, in the same groups"
        )

    def _on_all(self, tensor: Tensor) -> list[Tensor]:
        """The `tensor` of every rank, in the order of ranks, on the CPU."""
        own = tensor.to(self.mesh.device_type).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.mesh.size())]
        dist.all_gather(parts, own, group=self.mesh.get_group())
        return [part.cpu() for part in parts]


def slice_of(module: nn.Module) -> ExpertSlice | None:
    """The experts of a module in this process if it is expert parallel; None otherwise.

    transformers 5.17 sets no flag. A module is expert parallel if every tensor is sharded along its
    first dimension only, and `num_experts` is the number of local experts. Sharding for data
    parallelism looks the same, but there `num_experts` is the number of all experts.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if not tensors or not all(_by_expert(tensor) for tensor in tensors):
        return None
    first: Any = tensors[0]
    experts, mesh = first.shape[0], first.device_mesh
    count = experts // mesh.size()
    if experts % mesh.size() or getattr(module, "num_experts", None) != count:
        return None
    return ExpertSlice(mesh.get_local_rank() * count, count, mesh)


def _by_expert(tensor: Any) -> bool:
    """Whether a tensor is sharded along its first dimension, over a one-dimensional mesh."""
    placements: Any = getattr(tensor, "placements", ())
    return len(placements) == 1 and bool(placements[0].is_shard(0))
