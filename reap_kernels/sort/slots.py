"""Sorted slots on a device, and the tile lists that grouped products and reductions walk.

The same arrays whatever kernels made them, so that kernels of different kinds can be mixed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Tiles of sorted rows, each of one expert; M is the most there can be.

    Attributes:
        experts: [M] int32, expert of each tile.
        rows: [M] int32, first sorted row of each tile.
        firsts: [E + 1] int32, first tile of each expert; `firsts[E]` tiles are in use.
    """

    experts: Tensor
    rows: Tensor
    firsts: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Experts, rows and firsts, as kernels take them."""
        return self.experts, self.rows, self.firsts

    @property
    def bound(self) -> int:
        """Most tiles there can be: the size of a launch, known without asking the device."""
        return len(self.experts)


@dataclass(frozen=True)
class SortedSlots:
    """A routing on the device, with what kernels need beyond `Routing`.

    Attributes:
        gather_index: [S] int64, slot of each sorted row.
        scatter_index: [S] int64, sorted row of each slot.
        offsets: [E + 1] int64, first row of each expert; `offsets[E]` rows are served.
        top_k: slots of a token.
        schedule: lists tiles: (offsets, S, block_m).
    """

    gather_index: Tensor
    scatter_index: Tensor
    offsets: Tensor
    top_k: int
    schedule: Callable[[Tensor, int, int], Tiles]
    _tiles: dict[int, Tiles] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.offsets) - 1

    def part(self, first: int, last: int) -> "SortedSlots":
        """The rows of experts first to last - 1, as experts 0, 1, ... of as many rows in all."""
        # A tensor of its own, aligned whatever `first`: Triton compiles for an alignment.
        offsets = self.offsets[first : last + 1].clone()
        return SortedSlots(
            self.gather_index, self.scatter_index, offsets, self.top_k, self.schedule
        )

    def tiles(self, block_m: int) -> Tiles:
        """The tile list for tiles of `block_m` rows, made once."""
        if block_m not in self._tiles:
            self._tiles[block_m] = self.schedule(self.offsets, len(self.gather_index), block_m)
        return self._tiles[block_m]


def empty_tiles(offsets: Tensor, slots: int, block_m: int) -> Tiles:
    """Room for the tiles of `slots` rows: an expert's last tile may be partly empty, so there may
    be as many more than rows need as there are experts.
    """
    num_experts = len(offsets) - 1
    bound = slots // block_m + min(num_experts, slots)
    # Tensors of their own, aligned whatever the sizes: Triton compiles for an alignment.
    sizes = (bound, bound, num_experts + 1)
    return Tiles(*(offsets.new_empty(size, dtype=torch.int32) for size in sizes))
