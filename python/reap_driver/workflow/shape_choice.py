"""From the options of a shape to the shapes to choose from, and what is known before any Gram."""

import math
from dataclasses import dataclass, replace
from typing import Any

from reap_driver.compensation.shapes import check_shape
from reap_driver.compensation.shaping import Shaping
from reap_driver.planning.criteria import Scores
from reap_driver.planning.plan import Plan
from reap_driver.planning.shape import Shape
from reap_driver.workflow.rank_options import RATIO, RankOptions
from reap_driver.workflow.ranking import protected_of
from reap_driver.workflow.shape_options import ShapeOptions
from reap_kernels import SaliencyStats


@dataclass(frozen=True)
class ShapeChoice:
    """The shapes that options allow.

    Attributes:
        shaping: of the model.
        shapes: to choose from, narrowest first; one if it was given.
        ratio: share of the experts' weights that is asked to be removed.
        settings: as the plan records them.
    """

    shaping: Shaping
    shapes: list[Shape]
    ratio: float
    settings: dict[str, Any]

    @classmethod
    def of(
        cls,
        options: ShapeOptions,
        rank: RankOptions,
        scores: Scores,
        stats: SaliencyStats | None = None,
    ) -> "ShapeChoice":
        """The choice that options leave.

        Args:
            options: with a shape.
            rank: which experts stay, and for `shape='auto'` how much goes.
            scores: of every layer.
            stats: what the scores are of; None where there are none yet.

        Raises:
            PlanError: the shape does not fit the model, or nothing of the size that is asked for
                does.
        """
        held = protected_of(rank, scores, stats)
        shaping = Shaping(scores, stats, ridge=options.ridge, protected=held)
        settings = options.settings
        router, width, multiple = shaping.router, shaping.width, options.width_multiple
        given = options.explicit
        if given is None:
            ratio = RATIO if rank.ratio is None else rank.ratio
            return cls(shaping, shaping.shapes(ratio, multiple=multiple), ratio, settings)
        check_shape(given, router, width, multiple=multiple)
        ratio = 1 - math.prod(given) / (router.num_experts * width)
        return cls(shaping, [given], ratio, settings)

    @property
    def narrow(self) -> list[Shape]:
        """The shapes by which experts lose neurons."""
        return [shape for shape in self.shapes if shape.width < self.shaping.width]

    def foreseen(self) -> Plan:
        """The plan of the largest shape, if possible of one that removes neurons, before any neuron
        was chosen.
        """
        plan = self.shaping.blank(max(self.narrow or self.shapes, key=math.prod), self.ratio)
        return replace(plan, settings=plan.settings | self.settings)
