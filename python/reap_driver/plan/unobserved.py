"""Layers that no token reached, in a plan: they cannot be ranked, so they keep all their experts.

That is possible where the fields of the configuration that count them count no layer that is cut,
or where somebody asked for it.
"""

from collections.abc import Collection, Mapping

from reap_driver.plan.criteria import Scores
from reap_kernels.errors import PlanError


def unobserved_kept_whole(scores: Scores, asked: Mapping[str, float]) -> list[str]:
    """Layers that no token reached and that are to keep all their experts, as `asked` says by 0.

    Args:
        scores: of the layers that were reached.
        asked: what layers are to lose: shares, or numbers.

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
    """What a plan says of the layers that no token reached.

    Args:
        scores: of the others.
        whole: those that are to keep all their experts because somebody said so.
        cut: the layers that lose experts.

    Raises:
        PlanError: a layer that nobody mentioned shares its count with one that is cut.
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
