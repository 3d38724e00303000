"""Statistics that lack fields: nothing takes the zeros they were made with for sums."""

import itertools

import pytest
import torch

import reap_kernels as rk
from reap_kernels.errors import DataError
from reap_kernels.stats import EXTREMA, FIELDS, OPTIONAL, SUMS
from reap_kernels.testing import CASES, make_experts, make_inputs

CASE = next(case for case in CASES if case.name == "everything")
LACKING = ("norm_sq_sum", "weighted_norm_sq_sum", "out_min")
LAYER = "model.layers.0.mlp.experts"


def observed(missing: tuple[str, ...] = (), seed: int = 0) -> rk.LayerStats:
    """An observation that loses some fields."""
    inputs, whole = make_inputs(CASE, seed=seed), rk.LayerStats(CASE.experts, CASE.groups)
    rk.observe_layer(
        inputs.hidden,
        inputs.topk_ids,
        inputs.topk_weights,
        make_experts(CASE),
        whole,
        group=inputs.group,
    )
    return rk.LayerStats(CASE.experts, CASE.groups, missing=missing).merge_(whole)


def model(missing: tuple[str, ...] = (), seed: int = 0, parts: int = 0) -> rk.SaliencyStats:
    groups = [f"g{number}" for number in range(CASE.groups)]
    stats = rk.SaliencyStats({LAYER: observed(missing, seed)}, groups, {"gate": "model"})
    if not parts:
        return stats
    each = [model(missing, seed + number) for number in range(parts)]
    whole = each[0]
    for part in each[1:]:
        whole = whole.merge(part)
    return rk.SaliencyStats(whole.layers, groups, {"gate": "model"}, each)


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_field_that_is_missing_cannot_be_read(name: str) -> None:
    stats = observed((name,))
    with pytest.raises(DataError, match=f"^{name} is not recorded"):
        getattr(stats, name)
    assert name not in stats.fields()
    whole = observed()
    for other in FIELDS:
        if other != name:
            assert torch.equal(getattr(stats, other), getattr(whole, other)), other


def test_what_one_lacks_a_merge_lacks() -> None:
    for first, second in itertools.permutations([(), ("norm_sum",), ("out_max", "norm_sum")], 2):
        merged = observed(first).merge_(observed(second, seed=1))
        assert merged.missing == {*first, *second}
        assert torch.equal(merged.count, observed().merge_(observed(seed=1)).count)
    lacking = observed(LACKING)
    copies = (lacking.to("cpu"), lacking.total(), lacking.regrouped([0] * CASE.groups, 1))
    assert {copy.missing for copy in copies} == {frozenset(LACKING)}
    lacking.grow_groups(CASE.groups + 1)
    assert lacking.missing == frozenset(LACKING)
    both = model(LACKING).merge(model())
    assert both.missing == LACKING
    assert model().missing == ()


def test_nothing_is_observed_into_them() -> None:
    stats, inputs = observed(LACKING), make_inputs(CASE)
    before = stats.count.clone()
    what = "do not record norm_sq_sum, out_min, weighted_norm_sq_sum"
    with pytest.raises(DataError, match=what):
        rk.observe_layer(
            inputs.hidden, inputs.topk_ids, inputs.topk_weights, make_experts(CASE), stats
        )
    with pytest.raises(DataError, match=what):
        rk.accumulate(torch.ones(2, 4), torch.tensor([0, 1]), torch.ones(2), stats)
    with pytest.raises(DataError, match=what):
        stats.packed()
    assert torch.equal(stats.count, before)


@pytest.mark.parametrize("parts", [0, 2])
@pytest.mark.parametrize(
    "missing", [LACKING, SUMS, EXTREMA, OPTIONAL, ("out_max",)], ids=lambda names: names[-1]
)
def test_files_keep_what_is_missing(tmp_path, missing: tuple[str, ...], parts: int) -> None:
    stats = model(missing, parts=parts)
    stats.save(tmp_path / "s")
    again = rk.SaliencyStats.load(tmp_path / "s")
    assert again.missing == stats.missing == tuple(name for name in FIELDS if name in missing)
    assert [part.missing for part in again.parts] == [again.missing] * parts
    for key, value in stats.layers[LAYER].fields().items():
        assert torch.equal(again.layers[LAYER].fields()[key], value), key


def test_numbers_that_are_there_are_still_checked(tmp_path) -> None:
    stats = model(LACKING)
    stats.layers[LAYER].norm_sum[1, 0] = -1
    stats.save(tmp_path / "s")
    with pytest.raises(DataError, match=r"norm_sum is -1\.0; expected 0 or more"):
        rk.SaliencyStats.load(tmp_path / "s")


def test_counts_and_tokens_cannot_be_missing() -> None:
    for name in ("count", "nonfinite", "tokens", "sums"):
        with pytest.raises(DataError, match=f"missing names \\['{name}'\\]; only router_weight"):
            rk.LayerStats(4, missing=[name])
