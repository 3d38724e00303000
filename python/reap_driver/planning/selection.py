"""Selects layers by name, number or pattern, and experts by id or by extreme activations."""

import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from reap_kernels.errors import PlanError

# Super experts: above this quantile of all experts, and above this share of the largest.
_QUANTILE, _SHARE = 0.995, 0.1


def select_layers(selector: str, layers: Collection[str]) -> list[str]:
    """The layers that a selector matches.

    Args:
        selector: a layer's name; its number, which is the first in its name; or a pattern of names
            with `*`, `?` and `[...]`.
        layers: names of all layers.

    Raises:
        PlanError: it matches none.

    Example:
        >>> select_layers("3", ["layers.1.experts", "layers.3.experts"])
        ['layers.3.experts']
    """
    if selector in layers:
        return [selector]
    if selector.isdecimal():
        found = [name for name in layers if layer_number(name) == int(selector)]
    else:
        found = [name for name in layers if fnmatchcase(name, selector)]
    if not found:
        first, last = next(iter(layers)), list(layers)[-1]
        raise PlanError(
            f"layer {selector!r} is none of the {len(layers)} MoE layers, from {first} to {last}; "
            "give a name, the number in it, or a pattern such as '*.3.*'"
        )
    return found


def protected_experts(
    wanted: Sequence[tuple[str, Sequence[int]]], sizes: Mapping[str, int]
) -> dict[str, frozenset[int]]:
    """{layer: ids of its protected experts}, for layers that have any.

    Args:
        wanted: pairs of a selector of layers and ids; ids of one layer add up.
        sizes: {layer: number of experts}, for all layers.

    Raises:
        PlanError: a selector matches no layer, or a layer does not have that expert.
    """
    found: dict[str, frozenset[int]] = {}
    for selector, ids in wanted:
        for name in select_layers(selector, sizes):
            wrong = [expert for expert in ids if not 0 <= expert < sizes[name]]
            if wrong:
                raise PlanError(
                    f"layer {name}: expert {wrong[0]} cannot be protected; the layer has the ids "
                    f"0..{sizes[name] - 1}"
                )
            found[name] = found.get(name, frozenset()) | frozenset(ids)
    return {name: found[name] for name in sizes if name in found}


def super_experts(peaks: Mapping[str, Tensor]) -> dict[str, frozenset[int]]:
    """The few experts whose outputs hold extreme activations; without them models break down.

    As in "Unveiling Super Experts in Mixture-of-Experts Large Language Models" (arXiv 2507.23279):
    experts whose largest activation is above the 99.5th percentile of all experts and above a tenth
    of the largest. The paper considers only the layers in which massive activations form (in its
    code, the first three quarters); here every layer counts, so experts with large outputs in the
    last layers are kept too. At most 0.5 % of the experts, rounded up.

    Args:
        peaks: {layer: float64 [E]}, scores by `max_activation`.

    Returns:
        {layer: ids}, for layers that have any.
    """
    values = torch.cat(list(peaks.values()))
    threshold = max(float(values.quantile(_QUANTILE)), _SHARE * float(values.max()))
    above = {name: (peak > threshold).nonzero().flatten().tolist() for name, peak in peaks.items()}
    return {name: frozenset(ids) for name, ids in above.items() if ids}


def layer_number(name: str) -> int | None:
    """The first number that is a part of a layer's dotted name: of its decoder layer, as a rule.

    Example:
        >>> layer_number("model.layers.3.mlp.experts")
        3
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None
