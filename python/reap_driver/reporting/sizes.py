"""Parameters and weights of a model before and after a plan, where the statistics record them."""

from __future__ import annotations

from dataclasses import dataclass

from reap_driver.reporting.inputs import Inputs

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Sizes:
    """Both models. Rows of the routers, a few in ten thousand parameters, are not subtracted.

    Attributes:
        parameters: (before, after).
        nbytes: (before, after), of the weights in `dtype`; None if it is not known.
        dtype: of the weights that were observed, such as "bfloat16".
    """

    parameters: tuple[int, int]
    nbytes: tuple[int, int] | None
    dtype: str | None


def sizes_of(inputs: Inputs) -> Sizes | None:
    """The sizes; None without a plan, and where older statistics lack what they follow from."""
    known, plan = inputs.stats.provenance, inputs.plan
    model, layers = known.get("model") or {}, known.get("layers") or {}
    before = model.get("parameters")
    if plan is None or before is None:
        return None
    after = before
    for name, layer in plan.layers.items():
        one = layers.get(name, {}).get("expert_parameters")
        if layer.removed and one is None:
            return None
        after -= len(layer.removed) * (one or 0)
    dtype = model.get("dtype")
    size = _ITEM_BYTES.get(str(dtype))
    return Sizes((before, after), None if size is None else (size * before, size * after), dtype)
