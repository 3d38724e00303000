"""The space of budgets: how many experts each layer may lose when the sum is fixed, the plans a
search begins with, and the moves it makes.

The shapes of the first plans and the size of a move are those of EvoESAP (arXiv 2603.06003). All
random numbers come from `Random.random`, whose sequence Python keeps for a seed in every version.
"""

import heapq
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from reap_kernels.errors import PlanError

# Experts removed from each layer, in the order of the space's layers.
Removals = tuple[int, ...]

MOST_MOVES = 3  # in a mutation
MOST_MOVED = 4  # experts in a move, where routing groups let so few go

_RAMP = 3.0  # the heavy end of a ramp loses this many times what the light end does
_DECAY = 0.7  # of a front-heavy plan from layer to layer; the last layers lose hardly anything
_BLOCK = 2.0  # what a block loses beside the rest


@dataclass(frozen=True)
class Space:
    """Removals per layer that add up to what the uniform plan removes.

    Attributes:
        names: of the layers.
        uniform: what the uniform plan removes from each.
        least, most: bounds of each layer's removals.
        step: removals change by multiples of it, for routing groups must stay equal in size.
    """

    names: tuple[str, ...]
    uniform: Removals
    least: Removals
    most: Removals
    step: int

    @classmethod
    def around(
        cls,
        uniform: Mapping[str, int],
        most: Mapping[str, int],
        steps: Mapping[str, int],
        fixed: Collection[str] = (),
    ) -> "Space":
        """The space around the uniform plan.

        Args:
            uniform: layer -> experts that plan removes.
            most: layer -> the most that may go.
            steps: layer -> what its removals are multiples of.
            fixed: layers that lose what they lose in the uniform plan.

        Raises:
            PlanError: nothing can be moved from any layer to another.
        """
        step = math.lcm(*steps.values())
        least = [count if name in fixed else count % step for name, count in uniform.items()]
        room = [0 if name in fixed else most[name] - count for name, count in uniform.items()]
        start = tuple(uniform.values())
        highest = [count + r // step * step for count, r in zip(start, room, strict=True)]
        space = cls(tuple(uniform), start, tuple(least), tuple(highest), step)
        if not any(space.moves(start)):
            raise PlanError(
                f"no budget but the uniform one removes {sum(start)} experts from {len(start)} "
                f"layers, {step} at a time; use the uniform plan, or another ratio"
            )
        return space

    @property
    def total(self) -> int:
        """Experts removed from all layers together."""
        return sum(self.uniform)

    def contains(self, removals: Sequence[int]) -> bool:
        """Whether these removals keep every limit and add up."""
        return (
            len(removals) == len(self.names)
            and sum(removals) == self.total
            and all(
                low <= count <= high and (count - low) % self.step == 0
                for count, low, high in zip(removals, self.least, self.most, strict=True)
            )
        )

    def moves(self, removals: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Pairs of layers (source, target): the source may lose fewer, the target more experts."""
        sources = [i for i, count in enumerate(removals) if count - self.step >= self.least[i]]
        targets = [i for i, count in enumerate(removals) if count + self.step <= self.most[i]]
        return ((s, t) for s, t in itertools.product(sources, targets) if s != t)

    def mutated(self, removals: Removals, draw: Random) -> Removals:
        """Removals after 1 to 3 moves of 1 to 4 experts between two layers, fewer moves likelier.

        A move of routing groups takes at least one expert of each group.
        """
        counts = list(removals)
        for _ in range(1 + min(_below(draw, MOST_MOVES), _below(draw, MOST_MOVES))):
            possible = list(self.moves(counts))
            source, target = possible[_below(draw, len(possible))]
            room = min(counts[source] - self.least[source], self.most[target] - counts[target])
            most = max(1, min(room, MOST_MOVED) // self.step)
            moved = self.step * (1 + _below(draw, most))
            counts[source] -= moved
            counts[target] += moved
        return tuple(counts)

    def shared_out(self, weights: Sequence[float]) -> Removals:
        """Removals as near as may be to proportional to `weights`, by highest averages.

        Args:
            weights: one for each layer, above 0.
        """
        counts = list(self.least)
        queue = [(-weight / (low / self.step + 0.5), i) for i, (weight, low) in
                 enumerate(zip(weights, self.least, strict=True))]  # fmt: skip
        heapq.heapify(queue)
        for _ in range((self.total - sum(self.least)) // self.step):
            while counts[queue[0][1]] + self.step > self.most[queue[0][1]]:
                heapq.heappop(queue)
            i = queue[0][1]
            counts[i] += self.step
            heapq.heapreplace(queue, (-weights[i] / (counts[i] / self.step + 0.5), i))
        return tuple(counts)

    def first(self, number: int, draw: Random) -> list[Removals]:
        """The plans a search begins with, none twice: uniform, then shapes, then random weights.

        Args:
            number: at most so many; fewer where the space has few.
        """
        found = dict.fromkeys([self.uniform, *map(self.shared_out, self._shapes())])
        for _ in range(10 * number):
            if len(found) >= number:
                break
            found[self.shared_out([0.05 + draw.random() for _ in self.names])] = None
        return list(found)[:number]

    def _shapes(self) -> Iterator[list[float]]:
        """Weights of ramps, triangles, heavy ends, blocks and stripes, times what is uniform."""
        for shape in shapes(len(self.names)):
            yield [w * max(1, count) for w, count in zip(shape, self.uniform, strict=True)]


def shapes(layers: int) -> list[list[float]]:
    """Weights of the layers in every shape: up, down, triangle, valley, front and back heavy,
    early and late block, stripes.
    """
    last = max(1, layers - 1)
    up = [1 + (_RAMP - 1) * i / last for i in range(layers)]
    triangle = [1 + (_RAMP - 1) * (1 - abs(2 * i / last - 1)) for i in range(layers)]
    valley = [1 + (_RAMP - 1) * abs(2 * i / last - 1) for i in range(layers)]
    front = list(itertools.accumulate([1.0] + [_DECAY] * (layers - 1), lambda a, b: a * b))
    early = [_BLOCK if 4 * i < layers else 1.0 for i in range(layers)]
    stripes = [1.0 if i % 2 else _BLOCK for i in range(layers)]
    return [up, up[::-1], triangle, valley, front, front[::-1], early, early[::-1], stripes]


def _below(draw: Random, bound: int) -> int:
    """A whole number in [0, bound)."""
    return int(draw.random() * bound)
