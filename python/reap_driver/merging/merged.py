"""Puts merged experts into a model in memory: every expert of a group gets the group's weights.

The router stays as it is and goes on choosing among all experts, as in the code of both papers. So
a merged model has fewer different experts, not fewer experts: a checkpoint of it is as large as the
original's, unless an engine can let experts share their weights.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.evaluation.compensation import check_resident
from reap_driver.merging.averaging import merged_parts
from reap_driver.merging.grouping import Groups, groups_of
from reap_driver.merging.vectors import LayerVectors
from reap_driver.model.discover import MoELayer, find_moe_layers
from reap_driver.model.expert_parts import part_views
from reap_kernels.errors import PlanError

ALIGNED = {"hc-smoe": False, "m-smoe": True}  # whether neurons are aligned before they are averaged


@typed
@contextlib.contextmanager
def merged_experts(
    model: PreTrainedModel,
    vectors: Mapping[str, LayerVectors],
    method: str = "hc-smoe",
    ratio: float = 0.5,
) -> Iterator[dict[str, Groups]]:
    """Inside the context, groups of experts share their weighted mean, as HC-SMoE or M-SMoE merges
    them: baselines to compare pruning with.

    The router keeps its E outputs, so a checkpoint of the merged model would not be smaller. On
    exit, also by an exception, the model is restored bit by bit.

    - `hc-smoe` (arXiv 2410.08589): in each layer, E - floor(E * ratio) clusters of experts by
      average linkage on the Euclidean distances of their mean outputs over all tokens.
    - `m-smoe` (arXiv 2310.01334): as many groups over all layers, around the experts that most
      tokens were routed to, at least one in each layer. Another expert joins the one with the
      highest cosine of router logits, and its neurons are aligned to that one's.

    In both, weights are means weighted by the tokens that were routed to each expert. They are
    computed in float64 and rounded once to the model's dtype.

    Memory: inside, the experts of groups of several are kept aside where they are, at most as much
    as all experts take.

    Args:
        model: a loaded MoE model, with its experts in memory. Nothing else may use it meanwhile.
        vectors: of this model, from `observe_vectors`. Layers without vectors stay as they are.
        method: `hc-smoe` or `m-smoe`.
        ratio: share of experts that merging saves, 0 < ratio < 1.

    Yields:
        {layer: groups of expert ids}, in each the expert that most tokens were routed to first.

    Raises:
        UsageError: no such method or ratio, or scipy is not installed (the extra `merging`).
        DataError: vectors that the method needs were not observed.
        PlanError: the vectors are of another model.
        UnsupportedModel: experts are offloaded, spread over processes, or of a kind whose matrices
            are not known.

    Example:
        >>> with rd.observe_vectors(model) as obs:
        ...     obs(input_ids=ids)
        >>> with torch.no_grad(), rd.merged_experts(model, obs.vectors, "m-smoe", 0.25) as groups:
        ...     logits = model(input_ids=ids).logits  # [batch, seq, vocabulary]
        >>> sum(map(len, groups.values()))  # of 4 layers of 32 experts
        96
    """
    layers = {layer.name: layer for layer in find_moe_layers(model)}
    for name, layer_vectors in vectors.items():
        found = layers[name].num_experts if name in layers else "no"
        if len(layer_vectors.count) != found:
            raise PlanError(
                f"vectors: {name!r} has {len(layer_vectors.count)} experts there and {found} in "
                "the model; observe this model"
            )
    groups = groups_of(vectors, method, ratio)
    with contextlib.ExitStack() as stack:
        for name, own in groups.items():
            count = vectors[name].count
            stack.enter_context(_merged(layers[name], own, count, aligned=ALIGNED[method]))
        yield groups


@contextlib.contextmanager
def _merged(layer: MoELayer, groups: Groups, count: Tensor, *, aligned: bool) -> Iterator[None]:
    """Inside, the experts of each group have the weights of the group."""
    check_resident(layer)
    weights, views = part_views(layer)
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for group in groups:
                if len(group) == 1:
                    continue
                parts = merged_parts(weights, views, group, count, aligned=aligned)
                for part, value in parts.items():
                    for expert in group:
                        saved.append((views[part][expert], views[part][expert].clone()))
                        views[part][expert].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for view, before in saved:
                view.copy_(before)
