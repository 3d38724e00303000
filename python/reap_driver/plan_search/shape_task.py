"""The shapes of a search: what each is expected to cost, its plan, and its context in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reap_driver.base.units import in_bytes
from reap_driver.compensation.shaping import Shaping
from reap_driver.evaluation.compensation import PlannedModel, check_resident
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.files.gram_folder import GramFolder
from reap_driver.memory.machine import free_device_memory
from reap_driver.model.expert_parts import matrices_in
from reap_driver.plan_search.fitness import Candidate
from reap_driver.planning.plan import Plan
from reap_driver.planning.shape import Shape
from reap_kernels import LayerGram
from reap_kernels.errors import DataError, PlanError, ResourceError

Grams = Mapping[str, LayerGram] | GramFolder


class ShapeTask:
    """The shapes to search, in a model in memory.

    Reads every layer once, for the order in which its neurons can go. The matrices of a shape are
    computed when it is tried, and not kept: those of one shape are in memory at a time.

    Args:
        masks: router masks of the model.
        grams: {layer: its Gram sums}, or their folder.
        shaping: of the model's statistics.
        whole: the plan that removes whole experts only; its ratio is that of all shapes.
        multiple: of which widths are multiples, see `allowed_shapes`.
        settings: recorded in the plan.

    Attributes:
        shapes: those that remove neurons, narrowest first.
        notes: added to the plan.

    Raises:
        PlanError: no shape but the cut of whole experts has the size.
        DataError: a layer has no Gram sums.
        UnsupportedModel: the experts' matrices are not in the memory of this process.
    """

    def __init__(
        self,
        masks: RouterMasks,
        grams: Grams,
        shaping: Shaping,
        whole: Plan,
        *,
        multiple: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._masks, self._grams, self._shaping, self._whole = masks, grams, shaping, whole
        self._settings = settings or {}
        self.notes: list[str] = []
        self.shapes = narrow_shapes(shaping, whole.ratio, multiple)
        for name in shaping.names:
            if (grams.layers if isinstance(grams, GramFolder) else grams).get(name) is None:
                raise DataError(
                    f"there are no Gram matrices of layer {name}; observe all layers of this model "
                    "with `gram=True`"
                )
            check_resident(masks.layers[name])

    @property
    def whole(self) -> Shape:
        """The shape of the cut of whole experts."""
        return Shape(len(next(iter(self._whole.layers.values())).kept), self._shaping.width)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that trying a shape takes at most: see `search_shape`."""
        return sum(self._held().values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the matrices of a shape, at most."""
        return sum(self._bytes(max(shape.experts * shape.width for shape in self.shapes)).values())

    def check_memory(self) -> None:
        """Raises ResourceError if a device has too little memory to try a shape."""
        for device, size in self._held().items():
            free = free_device_memory(device)
            if free is not None and size > free.nbytes:
                raise ResourceError(
                    f"trying a shape takes {in_bytes(size)} of memory on {device}, for its "
                    f"matrices and those that they replace, but {in_bytes(free.nbytes)} are free "
                    f"({free.bound}); use less text or a machine with more memory, or `plan`, "
                    "which needs one layer at a time"
                )

    def _held(self) -> dict[torch.device, int]:
        """`nbytes` of each device."""
        width = self._shaping.width
        return self._bytes(max(shape.experts * (shape.width + width) for shape in self.shapes))

    def _bytes(self, columns: int) -> dict[torch.device, int]:
        """Bytes of so many columns of down projections of each layer, by device."""
        found: dict[torch.device, int] = {}
        for name in self._shaping.names:
            down = self._down(name)[0]
            size = columns * down.shape[0] * down.element_size()
            found[down.device] = found.get(down.device, 0) + size
        return found

    def measure(self, name: str) -> None:
        """Finds the order of the neurons of one layer, which shapes need of all of them.

        Raises:
            ShapeError, DtypeError, DataError: Grams and experts do not fit each other, see
                `rd.prune_width`.
        """
        self._shaping.measure(name, *self._read(name), self.shapes[0].width)

    def plan(self, shape: Shape) -> Plan:
        """The plan of a shape."""
        if shape == self.whole:
            return self._whole.noting(self.notes)
        plan = self._shaping.plan(shape, self._whole.ratio, self._settings)
        return plan.noting(self.notes)

    def matrices(self, plan: Plan) -> Iterator[tuple[str, Tensor]]:
        """The new down projections [E', H, I'] of a plan, layer by layer; none of whole experts."""
        for name in self._shaping.names if plan.narrows else ():
            yield name, self._shaping.matrices(plan, name, *self._read(name))

    def candidate(self, plan: Plan, matrices: Mapping[str, Tensor] | None = None) -> Candidate:
        """The context of a plan.

        Args:
            plan: from `plan`.
            matrices: of it, if they exist already.
        """
        if not plan.narrows:
            return partial(self._masks.keeping, plan.kept)
        new = dict(self.matrices(plan)) if matrices is None else matrices
        return PlannedModel(self._masks, plan, new).active

    def measured(self, fitness: Callable[[Candidate], float]) -> Callable[[tuple[int, ...]], float]:
        """The fitness of shapes."""
        return lambda shape: fitness(self.candidate(self.plan(Shape(*shape))))

    def expected(self, shape: Shape) -> float:
        """Expected error of a shape."""
        return self._shaping.expected(shape)

    def _read(self, name: str) -> tuple[Sequence[Tensor], LayerGram]:
        """Down projections of a layer, and its Gram sums on their device."""
        down = self._down(name)
        gram = self._grams.get(name)
        assert gram is not None, "checked before"
        return down, gram if gram.device == down[0].device else gram.to(down[0].device)

    def _down(self, name: str) -> list[Tensor]:
        return [matrix.detach() for matrix in matrices_in(self._masks.layers[name]).down]


def narrow_shapes(shaping: Shaping, ratio: float, multiple: int | None) -> list[Shape]:
    """The allowed shapes that remove neurons, narrowest first.

    Raises:
        PlanError: there is none.
    """
    shapes = shaping.shapes(ratio, multiple=multiple)
    narrow = [shape for shape in shapes if shape.width < shaping.width]
    if not narrow:
        raise PlanError(
            f"ratio {ratio:g}: no shape but whole experts has that size; use a smaller "
            "`width_multiple`, or another ratio"
        )
    return narrow
