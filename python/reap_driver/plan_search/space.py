"""The space of budgets: removals per layer with a fixed sum, the first candidates, and mutations.

The shapes of the first candidates and the size of a move are those of EvoESAP (arXiv 2603.06003).
All random numbers come from `Random.random`, because Python guarantees its sequence for a seed in
every version.
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

MOST_MOVES = 3  # moves per mutation
MOST_MOVED = 4  # experts per move, unless routing groups are larger

_RAMP = 3.0  # removals at the heavy end of a ramp, relative to the light end
_DECAY = 0.7  # removals of a layer in a front-heavy plan, relative to the layer before
_BLOCK = 2.0  # removals of a layer in a block, relative to the other layers


@dataclass(frozen=True)
class Space:
    """All removals per layer whose sum is that of the uniform plan.

    Attributes:
        names: names of the layers.
        uniform: number of experts that the uniform plan removes from each layer.
        least, most: bounds of each layer's removals.
        step: removals change by multiples of it, because routing groups must keep equal sizes.
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
            uniform: {layer: number of experts that the plan removes}.
            most: {layer: largest number of experts that may be removed}.
            steps: {layer: number that its removals are a multiple of}.
            fixed: layers whose removals are those of the uniform plan.

        Raises:
            PlanError: no removal can be moved from one layer to another.
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
        """Whether these removals are in the space."""
        return (
            len(removals) == len(self.names)
            and sum(removals) == self.total
            and all(
                low <= count <= high and (count - low) % self.step == 0
                for count, low, high in zip(removals, self.least, self.most, strict=True)
            )
        )

    def moves(self, removals: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Pairs of layers (source, target) that a move may take removals from and give them to."""
        sources = [i for i, count in enumerate(removals) if count - self.step >= self.least[i]]
        targets = [i for i, count in enumerate(removals) if count + self.step <= self.most[i]]
        return ((s, t) for s, t in itertools.product(sources, targets) if s != t)

    def mutated(self, removals: Removals, draw: Random) -> Removals:
        """Removals after 1 to 3 moves of 1 to 4 experts between two layers; fewer are more likely.

        With routing groups, a move takes the same number of experts, at least one, of each group.
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
        """Removals approximately proportional to `weights`, by the highest-averages method.

        Args:
            weights: one per layer, above 0.
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
        """The distinct first candidates: uniform, then the shapes, then random weights.

        Args:
            number: how many at most; fewer if the space is small.
        """
        found = dict.fromkeys([self.uniform, *map(self.shared_out, self._shapes())])
        for _ in range(10 * number):
            if len(found) >= number:
                break
            found[self.shared_out([0.05 + draw.random() for _ in self.names])] = None
        return list(found)[:number]

    def _shapes(self) -> Iterator[list[float]]:
        """Weights of every shape, multiplied by the uniform plan's removals."""
        for shape in shapes(len(self.names)):
            yield [w * max(1, count) for w, count in zip(shape, self.uniform, strict=True)]


def shapes(layers: int) -> list[list[float]]:
    """Weights of the layers in every shape: increasing, decreasing, triangle, valley, front-heavy,
    back-heavy, early block, late block, stripes.
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
    """A random integer in [0, bound)."""
    return int(draw.random() * bound)
