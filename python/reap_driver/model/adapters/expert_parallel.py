"""Experts spread over ranks whole: what transformers' expert parallelism leaves in a process.

Its tensors are DTensors sharded by expert, plain local ones while their module runs; its routers
give local ids, and for the experts of other ranks the number of local experts, with gate 0. So a
rank's statistics are exactly those of its experts, and the layer's are the ranks' side by side.
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
    """The experts of one layer that live in this process.

    Attributes:
        first: global id of the first.
        count: how many; the same on every rank, and rank r has those from r * count.
        mesh: the one-dimensional DeviceMesh of the ranks that hold the layer.
    """

    first: int
    count: int
    mesh: Any = field(repr=False, compare=False)

    def gathered(self, name: str, own: LayerStats) -> LayerStats:
        """Statistics of the whole layer, on the CPU, on every rank; every rank must call it.

        Args:
            name: the layer's, for messages.
            own: this rank's statistics, of `count` experts.

        Raises:
            DataError: on every rank, the ranks counted different tokens or groups, so they were
                given different batches.
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
        """`tensor` of every rank in their order, over whatever connects the ranks."""
        own = tensor.to(self.mesh.device_type).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.mesh.size())]
        dist.all_gather(parts, own, group=self.mesh.get_group())
        return [part.cpu() for part in parts]


def slice_of(module: nn.Module) -> ExpertSlice | None:
    """Which experts of a module are here, if it is expert parallel; None if it is anything else.

    Read from the tensors' layout and the module's own count (transformers 5.17 sets no flag): every
    tensor split along its first dimension, by nothing else, and the module counting its part. Also
    a model sharded for data parallelism is split so, but counts all its experts.
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
    """Whether a tensor is split along its first dimension over one dimension of ranks."""
    placements: Any = getattr(tensor, "placements", ())
    return len(placements) == 1 and bool(placements[0].is_shard(0))
