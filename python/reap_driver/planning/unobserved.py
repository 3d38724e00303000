"""Layers that no token reached: their experts cannot be ranked, so a plan keeps all of them.

That is possible if no field of the configuration counts their experts together with those of a
layer that loses some, or if the user asked for it.
"""

from collections.abc import Collection, Mapping

from reap_driver.planning.criteria import Scores
from reap_kernels.errors import PlanError


def unobserved_kept_whole(scores: Scores, asked: Mapping[str, float]) -> list[str]:
    """Layers that no token reached and for which `asked` has 0: they are to keep all experts.

    Args:
        scores: of the layers that tokens reached.
        asked: {layer: share or number of experts to remove}.

    Raises:
        PlanError: such a layer is to lose experts.
    """
    named = [name for name in scores.unobserved if name in asked]
    for name in named:
        if asked[name]:
            raise PlanError(
                f"layer {name} was reached by no token, so its experts cannot be ranked, and it "
                f"is to lose some ({asked[name]:g}); give it the ratio 0, or calibrate with data "
                "that reaches it (images for vision experts: records with image parts)"
            )
    return named


def unobserved_notes(scores: Scores, whole: Collection[str], cut: Collection[str]) -> list[str]:
    """Notes of a plan on the layers that no token reached.

    Args:
        scores: of the other layers.
        whole: layers that are to keep all experts because the user asked for it.
        cut: layers that lose experts.

    Raises:
        PlanError: a layer that no token reached and that is not in `whole` is counted by the same
            field as a layer in `cut`.
    """
    layers = scores.unobserved
    field = {name: field for field, names in scores.stacks.items() for name in names}
    for name in layers:
        if name in whole:
            continue
        other = next((o for o in cut if name not in field or field.get(o) == field[name]), None)
        if other is not None:
            raise PlanError(
                f"layer {name} ({len(layers)} in all) was reached by no token, so its experts "
                f"cannot be ranked, and {field.get(name, 'the configuration')} counts them "
                f"together with those of {other}, which loses some; calibrate with data that "
                "reaches it (images for vision experts: records with image parts), or give it the "
                "ratio 0 (--layer-ratios) and write the plan as masks (apply --as-masks)"
            )
    if not layers:
        return []
    names = ", ".join(layers[:2]) + (", ..." if len(layers) > 2 else "")
    return [f"{len(layers)} MoE layers were reached by no token and keep all experts: {names}"]
