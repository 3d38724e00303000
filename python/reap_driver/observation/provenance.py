"""What the statistics of an observation record of where they came from."""

import datetime
from collections.abc import Collection, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import reap_kernels
from reap_driver.model.discover import MoELayer, record_of
from reap_driver.model.expert_dims import stacks_of


def provenance_of(
    model: PreTrainedModel,
    layers: Sequence[MoELayer],
    kept: Collection[str],
    *,
    backends: Collection[str],
) -> dict[str, Any]:
    """The provenance of statistics, but for the data and notes.

    Args:
        model: that was observed.
        layers: all of its MoE layers.
        kept: names of those that tokens reached; the others are listed in `unobserved`, with the
            `stacks` of layers that share a config field for their number of experts.
        backends: that computed the statistics.
    """
    facts: dict[str, Any] = {
        **record_of(model, [layer for layer in layers if layer.name in kept]),
        "data": [],
        "gate": "model",
        "software": {
            "reap_kernels": reap_kernels.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "backend": "+".join(sorted(backends)),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    unobserved = [layer.name for layer in layers if layer.name not in kept]
    if unobserved:
        stacks = stacks_of(model, {layer.name: layer.num_experts for layer in layers})
        facts["stacks"] = {stack.field: list(stack.layers) for stack in stacks}
        facts["unobserved"] = unobserved
    return facts
