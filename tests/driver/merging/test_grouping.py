"""Groups of experts against both methods by brute force."""

import itertools
import sys

import pytest
import torch
from torch import Tensor

import reap_driver as rd
from reap_driver.merging.grouping import average_linkage, groups_of
from reap_kernels.errors import DataError, UsageError


def upgma(points: Tensor, number: int) -> set[frozenset[int]]:
    """Average linkage from its definition: again and again, the two clusters are joined whose
    points have the smallest mean distance.
    """
    clusters = [frozenset([i]) for i in range(len(points))]
    while len(clusters) > number:
        pairs = itertools.combinations(clusters, 2)
        one, two = min(
            pairs,
            key=lambda p: (
                sum((points[i] - points[j]).norm() for i in p[0] for j in p[1])
                / (len(p[0]) * len(p[1]))
            ),
        )
        clusters = [c for c in clusters if c not in (one, two)] + [one | two]
    return set(clusters)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("number", [1, 3, 6, 9, 10])
def test_clusters_are_those_of_average_linkage(seed: int, number: int) -> None:
    points = torch.randn(10, 4, generator=torch.Generator().manual_seed(seed)).double()
    labels = average_linkage(points, number)
    found = {frozenset(i for i, own in enumerate(labels) if own == label) for label in labels}
    assert found == upgma(points, number)
    assert all(label == min(i for i, own in enumerate(labels) if own == label) for label in labels)


def test_equal_points_still_give_the_number_of_clusters() -> None:
    for number in range(1, 7):
        labels = average_linkage(torch.ones(6, 3), number)
        assert len(set(labels)) == number
        assert labels == average_linkage(torch.ones(6, 3), number)


def vectors(
    seed: int, experts: int = 8, tokens: int = 40
) -> tuple[rd.LayerVectors, Tensor, Tensor]:
    """Vectors of a layer with random outputs and logits; the means and the logits."""
    rng = torch.Generator().manual_seed(seed)
    means = torch.randn(experts, 5, generator=rng).double()
    logits = torch.randn(tokens, experts, generator=rng).double()
    count = torch.randint(0, tokens, (experts,), generator=rng)
    found = rd.LayerVectors(tokens, count, means * tokens, logits.mT @ logits)
    return found, means, logits


@pytest.mark.parametrize("ratio", [0.125, 0.25, 0.3, 0.5, 0.9])
def test_hc_smoe_clusters_the_mean_outputs_of_each_layer(ratio: float) -> None:
    layers = {f"layer {seed}": vectors(seed) for seed in range(3)}
    found = groups_of({name: one for name, (one, _, _) in layers.items()}, "hc-smoe", ratio)
    for name, (one, means, _) in layers.items():
        assert {frozenset(g) for g in found[name]} == upgma(means, 8 - int(8 * ratio))
        for group in found[name]:
            counts = [int(one.count[e]) for e in group]
            assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("ratio", [0.125, 0.25, 0.5, 0.85])
def test_m_smoe_groups_around_the_most_frequent_experts(ratio: float) -> None:
    layers = {f"layer {seed}": vectors(seed) for seed in range(4)}
    found = groups_of({name: one for name, (one, _, _) in layers.items()}, "m-smoe", ratio)
    number = 4 * (8 - int(8 * ratio))
    every = [(n, e) for n in layers for e in range(8)]
    often = {(n, e): int(layers[n][0].count[e]) for n, e in every}
    first = [max(((n, e) for e in range(8)), key=lambda at: often[at]) for n in layers]
    rest = sorted((at for at in every if at not in first), key=lambda at: -often[at])
    dominant = {*first, *rest[: number - len(first)]}
    assert sum(map(len, found.values())) == number
    for name, (_, _, logits) in layers.items():
        want: dict[int, set[int]] = {e: {e} for n, e in dominant if n == name}
        for expert in set(range(8)) - set(want):
            cosine = {
                d: float(torch.cosine_similarity(logits[:, expert], logits[:, d], dim=0))
                for d in want
            }
            want[max(cosine, key=lambda d: cosine[d])].add(expert)
        assert {frozenset(g) for g in found[name]} == {frozenset(g) for g in want.values()}


def test_ties_go_to_the_lower_layer_and_the_lower_expert() -> None:
    same = rd.LayerVectors(
        4, torch.ones(4).long(), torch.ones(4, 2).double(), torch.ones(4, 4).double()
    )
    found = groups_of({"a": same, "b": same}, "m-smoe", 0.5)
    assert found == {"a": ((0, 3), (1,), (2,)), "b": ((0, 1, 2, 3),)}
    assert groups_of({"a": same, "b": same}, "m-smoe", 0.5) == found


def test_a_layer_keeps_one_dominant_expert_however_rarely_it_is_used() -> None:
    often, _, _ = vectors(0)
    rare = rd.LayerVectors(4000, torch.arange(8), logit_products=torch.eye(8).double())
    found = groups_of({"often": often, "rare": rare}, "m-smoe", 0.5)
    assert len(found["rare"]) == 1
    assert found["rare"][0][0] == 7
    assert len(found["often"]) == 7


@pytest.mark.parametrize(
    ("method", "ratio", "error", "words"),
    [
        ("cluster", 0.5, UsageError, "method 'cluster' is not known; choose one of hc-smoe"),
        ("hc-smoe", 0.0, UsageError, "ratio is 0.0; give a number above 0"),
        ("hc-smoe", 1.0, UsageError, "ratio is 1.0"),
        ("m-smoe", float("nan"), UsageError, "ratio is nan"),
    ],
)
def test_what_is_no_method_or_ratio_is_refused(method, ratio, error, words) -> None:
    with pytest.raises(error, match=words):
        groups_of({"a": vectors(0)[0]}, method, ratio)


def test_vectors_that_a_method_needs_are_asked_for() -> None:
    count = torch.ones(8).long()
    with pytest.raises(DataError, match="a: no outputs were summed; observe with outputs=True"):
        groups_of({"a": rd.LayerVectors(4, count)}, "hc-smoe", 0.5)
    with pytest.raises(DataError, match="a: no logits were summed; observe with logits="):
        groups_of({"a": rd.LayerVectors(4, count)}, "m-smoe", 0.5)
    with pytest.raises(DataError, match="no layer was observed"):
        groups_of({}, "hc-smoe", 0.5)
    broken = torch.full((8, 2), torch.nan).double()
    with pytest.raises(DataError, match="a: its outputs hold NaN or Inf"):
        groups_of({"a": rd.LayerVectors(4, count, broken)}, "hc-smoe", 0.5)


def test_scipy_is_named_where_it_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.cluster.hierarchy", None)
    with pytest.raises(UsageError, match=r"needs scipy, which is not installed; .* `merging`"):
        groups_of({"a": vectors(0)[0]}, "hc-smoe", 0.5)
