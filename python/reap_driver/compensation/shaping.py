"""Plans of one shape: every layer keeps equally many experts, and equally many neurons of each.

The order in which the neurons of a layer can go serves all shapes, so it is found once, layer by
layer. What a shape is expected to cost, its plan and its new down projections follow from it.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

from torch import Tensor

from reap_driver.compensation.shapes import allowed_shapes, expected_error
from reap_driver.compensation.width import RIDGE, WidthOrder, cut_width, width_order
from reap_driver.planning.budget import Router
from reap_driver.planning.criteria import Scores
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.planning.planner import plan_keeping
from reap_driver.planning.shape import Shape
from reap_kernels import LayerGram, SaliencyStats
from reap_kernels.errors import DataError, PlanError, ShapeError
from reap_kernels.schema import short


class Shaping:
    """What is known of the neurons of every layer of a model, for plans of any shape.

    Memory: one layer's down projections and Grams while they are worked on, and 16 bytes per neuron
    that may go.

    Args:
        scores: of every MoE layer; they decide which experts stay.
        stats: what the scores are of; they decide what a shape is expected to cost. None where
            there are none yet, and nothing can be expected.
        ridge: see `prune_width`.
        protected: {layer: ids} of experts that stay whatever their scores.

    Attributes:
        router: of the first layer; all layers have as many experts and choose among them alike.
        width: I, of every layer.

    Raises:
        PlanError: layers differ, or no token reached one.
    """

    def __init__(
        self,
        scores: Scores,
        stats: SaliencyStats | None,
        *,
        ridge: float = RIDGE,
        protected: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        self._scores, self._stats, self.ridge = scores, stats, ridge
        self._protected = protected or {}
        self.router, self.width = _alike(scores)
        self._orders: dict[str, WidthOrder] = {}
        self._few: dict[str, int] = {}
        self._none: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """Of the layers."""
        return list(self._scores)

    def shapes(self, ratio: float, *, multiple: int | None = None) -> list[Shape]:
        """The shapes that remove a share of the expert weights, narrowest first; protected experts
        stay in all of them. See `allowed_shapes`.

        Raises:
            PlanError: there is none.
        """
        found = allowed_shapes(self.router, self.width, ratio, multiple=multiple)
        held = [Router.of(name, self._scores.layers[name]) for name in self._protected]
        most = min((r.most(self._protected[r.name]) for r in held), default=self.router.num_experts)
        left = [shape for shape in found if self.router.num_experts - shape.experts <= most]
        if not left:
            raise PlanError(
                f"ratio {ratio:g}: no shape keeps the protected experts, of which a layer has "
                f"{max(map(len, self._protected.values()))}; protect fewer, or use a smaller ratio"
            )
        return left

    def measure(
        self, name: str, down: Tensor | Sequence[Tensor], gram: LayerGram, least: int
    ) -> None:
        """Finds the order of the neurons of one layer, which shapes need of all of them.

        Args:
            name: of the layer.
            down: [E, H, I], or [H, I] of each of its experts.
            gram: of the layer.
            least: the smallest width that is wanted later.

        Raises:
            ShapeError, DtypeError, DataError: see `prune_width`.
        """
        with _named(name):
            self._orders[name] = width_order(down, gram, least=least, ridge=self.ridge)
        counts = gram.count
        self._few[name] = int(((counts > 0) & (counts < 2 * self.width)).sum())
        self._none[name] = int((counts == 0).sum())

    def expected(self, shape: Shape) -> float:
        """The mean over layers of `expected_error`."""
        assert self._stats is not None, "nothing was observed"
        plan = plan_keeping(self._scores, shape.experts, ratio=0.5, protected=self._protected)
        errors = [
            expected_error(
                self._stats.layers[name], self._orders[name], kept, shape.width, self.router.top_k
            )
            for name, kept in plan.kept.items()
        ]
        return sum(errors) / len(errors)

    def blank(self, shape: Shape, ratio: float) -> Plan:
        """The plan of a shape before any neuron was chosen: every expert keeps its first ones.

        It has the sizes of the plan to come, and the experts, which is all that `matrices` needs.

        Raises:
            PlanError: a layer cannot keep that many experts.
        """
        plan = plan_keeping(self._scores, shape.experts, ratio=ratio, protected=self._protected)
        if shape.width == self.width:
            return plan
        first = tuple(range(shape.width))
        layers = {
            name: replace(layer, width=self.width, neurons=(first,) * len(layer.kept))
            for name, layer in plan.layers.items()
        }
        return replace(plan, layers=layers)

    def plan(self, shape: Shape, ratio: float, settings: Mapping[str, Any]) -> Plan:
        """The plan of a shape.

        Args:
            shape: what every layer keeps; with all I neurons it is a plan of whole experts.
            ratio: the share of the expert weights that was asked to be removed.
            settings: recorded in the plan besides its own.

        Raises:
            PlanError: a layer cannot keep that many experts.
        """
        plan = plan_keeping(self._scores, shape.experts, ratio=ratio, protected=self._protected)
        plan = replace(plan, settings={**plan.settings, **settings})
        if shape.width == self.width:
            return plan
        layers = {}
        for name, layer in plan.layers.items():
            neurons = self._orders[name].kept(shape.width)[list(layer.kept)].tolist()
            kept = tuple(map(tuple, neurons))
            layers[name] = LayerPlan.keeping(layer.num_experts, layer.kept, self.width, kept)
        return replace(plan, layers=layers).noting(self._notes())

    def matrices(
        self, plan: Plan, name: str, down: Tensor | Sequence[Tensor], gram: LayerGram
    ) -> Tensor:
        """The new down projections of one layer of a plan that removes neurons.

        Args:
            plan: from `plan` or `blank`.
            name, down, gram: as given to `measure`.

        Returns:
            [E', H, I'] in the dtype of `down`, on the device of `gram`.
        """
        layer = plan.layers[name]
        assert layer.narrow_width is not None, "a plan of whole experts needs no matrices"
        order = self._orders[name].of(layer.kept)
        with _named(name):
            return cut_width(down, gram, order, layer.narrow_width, experts=layer.kept).down

    def _notes(self) -> list[str]:
        """Sentences on experts whose Grams have few rows, or none."""
        few = {name: number for name, number in self._few.items() if number}
        none = {name: number for name, number in self._none.items() if number}
        notes = []
        if few:
            notes.append(
                f"{sum(few.values())} experts have fewer than {2 * self.width} rows, twice their "
                "width, so their down projections are corrected little; calibrate on more text "
                f"(layer: experts): {short(few)}"
            )
        if none:
            notes.append(
                f"{sum(none.values())} experts have no rows, so they keep their largest neurons "
                f"uncorrected (layer: experts): {short(none)}"
            )
        return notes


@contextlib.contextmanager
def _named(layer: str) -> Iterator[None]:
    """Inside, errors that name an expert name its layer, too."""
    try:
        yield
    except (DataError, ShapeError) as error:
        raise type(error)(f"layer {layer}: {error}") from error


def _alike(scores: Scores) -> tuple[Router, int]:
    """Router and width of all layers.

    Raises:
        PlanError: layers differ, their width is not known, or no token reached one.
    """
    if scores.unobserved:
        raise PlanError(
            f"layer {scores.unobserved[0]} ({len(scores.unobserved)} in all) was reached by no "
            "token, so which neurons its experts need is not known; calibrate with data that "
            "reaches it, or remove whole experts, without `shape`"
        )
    kinds: dict[tuple[Any, ...], str] = {}
    for name in scores:
        facts = scores.layers.get(name, {})
        router, width = Router.of(name, facts), facts.get("intermediate_size")
        if width is None:
            raise PlanError(
                f"layer {name}: the statistics do not record the width of its experts, which "
                "`shape` changes; observe again"
            )
        kinds.setdefault((*astuple(router)[1:], width), name)
    (first, name), *others = kinds.items()
    if others:
        other, second = others[0]
        raise PlanError(
            f"layers {name} and {second} differ in experts, choices per token, groups or width "
            f"({short(first)} and {short(other)}), so no shape fits both; remove whole experts, "
            "without `shape`"
        )
    return Router.of(name, scores.layers[name]), first[-1]
