"""Parameters and weights of a model before and after a plan, where the statistics record them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reap_driver.planning.plan import LayerPlan
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
        gone = _removed(layer, layers.get(name, {}))
        if gone is None:
            return None
        after -= gone
    dtype = model.get("dtype")
    size = _ITEM_BYTES.get(str(dtype))
    return Sizes((before, after), None if size is None else (size * before, size * after), dtype)


def _removed(layer: LayerPlan, facts: Mapping[str, Any]) -> int | None:
    """Parameters that a plan removes from a layer; None where its facts do not say."""
    whole, width, hidden = (
        facts.get(name) for name in ("expert_parameters", "intermediate_size", "hidden_size")
    )
    if layer.removed and whole is None:
        return None
    gone = len(layer.removed) * (whole or 0)
    if layer.narrow_width is None:
        return gone
    if whole is None or width is None or hidden is None:
        return None
    matrices, biases = divmod(whole, width * hidden)  # with a gate three, without one two
    neuron = matrices * hidden + (matrices - 1 if biases else 0)  # the down bias is no neuron's
    return gone + len(layer.kept) * (width - layer.narrow_width) * neuron
