"""Which experts are merged: groups by hierarchical clustering (HC-SMoE) or around dominant experts
(M-SMoE). Vectors in, groups out; ties go to the lower layer and the lower expert.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from reap_driver.merging.scientific import scipy_needed
from reap_driver.merging.vectors import LayerVectors
from reap_driver.planning.budget import floor_of
from reap_kernels.errors import DataError, UsageError

# Of one layer: groups of expert ids, each with the expert that most tokens were routed to first.
Groups = tuple[tuple[int, ...], ...]


def groups_of(vectors: Mapping[str, LayerVectors], method: str, ratio: float) -> dict[str, Groups]:
    """The groups of every layer; experts that stay as they are make groups of one.

    Args:
        vectors: {layer: its vectors}.
        method: one of `METHODS`.
        ratio: share of experts that merging saves, 0 < ratio < 1: floor(E * ratio) of a layer, or
            as many over all layers.

    Raises:
        UsageError: no such method, or no such ratio.
        DataError: vectors that the method needs were not observed, or are not finite.
    """
    if method not in METHODS:
        raise UsageError(f"method {method!r} is not known; choose one of {', '.join(METHODS)}")
    if isinstance(ratio, bool) or not (math.isfinite(ratio) and 0 < ratio < 1):
        raise UsageError(f"ratio is {ratio}; give a number above 0 and below 1, such as 0.5")
    if not vectors:
        raise DataError("no layer was observed; run text through `observe_vectors` first")
    labels = METHODS[method](vectors, ratio)
    return {name: _groups(vectors[name].count, found) for name, found in labels.items()}


def hc_smoe(vectors: Mapping[str, LayerVectors], ratio: float) -> dict[str, list[int]]:
    """HC-SMoE (arXiv 2410.08589): in each layer, average linkage by the Euclidean distance of the
    experts' mean outputs.

    Returns:
        {layer: label of each expert's group}.
    """
    points = {n: _needed(n, layer.mean_outputs, "outputs") for n, layer in vectors.items()}
    return {
        name: average_linkage(means, len(means) - floor_of(len(means), ratio))
        for name, means in points.items()
    }


def m_smoe(vectors: Mapping[str, LayerVectors], ratio: float) -> dict[str, list[int]]:
    """M-SMoE (arXiv 2310.01334): the experts that most tokens of all layers were routed to are
    dominant, at least one in each layer; each other expert joins the dominant one of its layer
    whose router logits are most similar to its own.

    Returns:
        {layer: dominant expert of each expert}.
    """
    dominant = _dominant(vectors, ratio)
    found = {}
    for name, layer in vectors.items():
        similarity = _needed(name, layer.logit_similarity, "logits")
        ids = torch.tensor(sorted(dominant[name]))
        nearest = ids[similarity[:, ids].argmax(dim=1)].tolist()  # of equal ones the first
        found[name] = [e if e in dominant[name] else near for e, near in enumerate(nearest)]
    return found


METHODS: dict[str, Callable[[Mapping[str, LayerVectors], float], dict[str, list[int]]]] = {
    "hc-smoe": hc_smoe,
    "m-smoe": m_smoe,
}


def average_linkage(points: Tensor, number: int) -> list[int]:
    """Hierarchical clustering (UPGMA) by Euclidean distance, down to a number of clusters.

    Args:
        points: [n, d].
        number: of clusters, 1 to n.

    Returns:
        The label of each point's cluster: the lowest number of a point in it.

    Raises:
        UsageError: scipy is not installed.
    """
    labels = list(range(len(points)))
    if number >= len(points):
        return labels
    with scipy_needed():
        from scipy.cluster.hierarchy import linkage
        from scipy.spatial.distance import pdist
    steps = linkage(pdist(points.double().numpy()), method="average")
    members = [[number] for number in labels]
    for first, second, *_ in steps[: len(points) - number].tolist():
        members.append(sorted(members[int(first)] + members[int(second)]))
    for cluster in members:  # later ones contain earlier ones
        for point in cluster:
            labels[point] = cluster[0]
    return labels


def _dominant(vectors: Mapping[str, LayerVectors], ratio: float) -> dict[str, set[int]]:
    """The dominant experts of each layer."""
    ranked = []
    found: dict[str, set[int]] = {}
    number = 0
    for place, (name, layer) in enumerate(vectors.items()):
        share = (layer.count.double() / max(layer.tokens, 1)).tolist()
        order = sorted(range(len(share)), key=lambda expert: (-share[expert], expert))
        found[name] = {order[0]}
        ranked += [(-share[expert], place, expert, name) for expert in order[1:]]
        number += len(share) - floor_of(len(share), ratio)
    for *_, expert, name in sorted(ranked)[: number - len(vectors)]:
        found[name].add(expert)
    return found


def _groups(count: Tensor, labels: list[int]) -> Groups:
    """Groups in the order of their lowest expert."""
    members: dict[int, list[int]] = {}
    for expert, label in enumerate(labels):
        members.setdefault(label, []).append(expert)
    routed = count.tolist()
    return tuple(tuple(sorted(ids, key=lambda e: (-routed[e], e))) for ids in members.values())


def _needed(name: str, values: Tensor | None, what: str) -> Tensor:
    """The values of a layer that a method needs.

    Raises:
        DataError: they were not observed, or are not finite.
    """
    if values is None:
        raise DataError(f"{name}: no {what} were summed; observe with {what}=True")
    if not bool(values.isfinite().all()):
        raise DataError(
            f"{name}: its {what} hold NaN or Inf; look for them in the checkpoint and in the data, "
            "and observe again"
        )
    return values
