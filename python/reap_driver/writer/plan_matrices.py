"""The matrices of a plan: found where they are, and checked to be the plan's."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from reap_driver.files.matrices import Matrices, holds_matrices
from reap_driver.planning.plan import LayerPlan, Plan
from reap_kernels.errors import PlanError

Given = Mapping[str, Tensor] | str | Path | None


def matrices_of(
    plan: Plan, given: Given, beside: Path | None = None
) -> Mapping[str, Tensor] | None:
    """The new down projections of the experts that a plan keeps.

    Args:
        plan: a plan; one that keeps experts as they are needs none.
        given: {layer: [E', H, I']}, their folder, or None for the folder `beside`.
        beside: where they are if they are not given.

    Returns:
        {layer: [E', H, I']}; None where the kept experts stay as they are.

    Raises:
        PlanError: they are missing, those of another plan, or do not have the plan's shapes.
    """
    if given is None:
        if not plan.compensates:
            return None
        if beside is None or not holds_matrices(beside):
            where = "" if beside is None else f", and {beside} is no folder of them"
            raise PlanError(
                "plan: changes the experts that it keeps, so it is used with its matrices"
                f"{where}; keep their folder beside the plan's file (plan.json, plan.matrices), or "
                "give it by `matrices` where a call takes that"
            )
        given = beside
    found = Matrices.open(given) if isinstance(given, str | Path) else given
    recorded = plan.matrices.get("digest")
    if isinstance(found, Matrices) and recorded not in (None, found.digest):
        raise PlanError(
            f"{found.folder}: has the digest {found.digest}, but the plan goes with matrices of "
            f"{recorded}; give the folder that was made with the plan"
        )
    shapes = shapes_of(found)
    for name, layer in plan.layers.items():
        if name in shapes:
            check_shape(name, layer, shapes[name])
        elif layer.neurons is not None:
            raise PlanError(
                f"matrices: have none of layer {name!r}, which the plan cuts to "
                f"{layer.narrow_width} neurons; give those that were made with the plan"
            )
    return found


def shapes_of(matrices: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
    """{layer: shape of its matrices}, without reading those on disk."""
    if isinstance(matrices, Matrices):
        return matrices.layers
    return {name: tuple(down.shape) for name, down in matrices.items()}


def check_shape(name: str, layer: LayerPlan, shape: tuple[int, ...]) -> None:
    """Checks the shape of a layer's new down projections, but for H, which a plan does not say.

    Raises:
        PlanError: it is not [experts kept, H, neurons kept].
    """
    experts, neurons = len(layer.kept), layer.narrow_width
    if len(shape) != 3 or shape[0] != experts or neurons not in (None, shape[2]):
        raise PlanError(
            f"matrices: those of layer {name!r} are {list(shape)}, but the plan keeps {experts} "
            f"experts{'' if neurons is None else f' of {neurons} neurons'}; give [experts kept, "
            "hidden size, neurons kept]"
        )
