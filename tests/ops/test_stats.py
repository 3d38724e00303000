"""Statistics: merge laws, groups, the file format and its refusals."""

import functools
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import reap_kernels as rk
from reap_kernels.errors import DataError, ShapeError
from reap_kernels.stats import EXTREMA, FIELDS, SUMS
from reap_kernels.testing import CASES, largest_relative_error, make_experts, make_inputs

CASE = next(case for case in CASES if case.name == "everything")


def observed(seeds, groups: int = CASE.groups) -> rk.LayerStats:
    experts = make_experts(CASE)
    stats = rk.LayerStats(CASE.experts, groups)
    for seed in seeds:
        inputs = make_inputs(CASE, seed=seed)
        rk.observe_layer(
            inputs.hidden,
            inputs.topk_ids,
            inputs.topk_weights,
            experts,
            stats,
            mask=inputs.mask,
            group=inputs.group if groups > 1 else 0,
        )
    return stats


def assert_same(a: rk.LayerStats, b: rk.LayerStats) -> None:
    for name in FIELDS:
        x, y = a.fields()[name], b.fields()[name]
        if name in SUMS:
            assert largest_relative_error(x, y) <= 1e-12, name
        else:
            assert torch.equal(x, y), name


def test_merge_is_observing_both() -> None:
    whole = observed([1, 2, 3])
    parts = [observed([seed]) for seed in (1, 2, 3)]
    assert_same(parts[0].to("cpu").merge_(parts[1]).merge_(parts[2]), whole)
    assert_same(parts[2].to("cpu").merge_(parts[0]).merge_(parts[1]), whole)
    empty = rk.LayerStats(CASE.experts, CASE.groups)
    assert_same(empty.merge_(whole), whole)


def test_groups_partition_the_total() -> None:
    assert_same(observed([4, 5]).total(), observed([4, 5], groups=1))


def test_growing_keeps_what_is_there() -> None:
    stats = observed([6])
    before = stats.to("cpu")
    stats.grow_groups(CASE.groups + 2)
    assert stats.num_groups == CASE.groups + 2
    assert int(stats.count[CASE.groups :].sum()) == 0
    assert torch.equal(stats.out_max[CASE.groups :], torch.full((2, CASE.experts), -torch.inf))
    assert_same(stats.total(), before.total())
    stats.grow_groups(1)
    assert stats.num_groups == CASE.groups + 2


def test_merge_refuses_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="9 experts"):
        rk.LayerStats(8).merge_(rk.LayerStats(9))
    with pytest.raises(ShapeError, match="grow_groups"):
        rk.LayerStats(8).merge_(rk.LayerStats(8), [1])
    with pytest.raises(ShapeError, match="0 experts"):
        rk.LayerStats(0)


def model(digest: str = "sha256:a", groups=("code", "chat"), seed: int = 1, **more):
    provenance = {"model": {"config_digest": digest}, "gate": "model", "data": [{"seed": seed}]}
    layers = {f"model.layers.{i}.mlp.experts": observed([seed + i], 4) for i in range(2)}
    for layer in layers.values():
        layer.grow_groups(len(groups))
    names = [*groups, *(f"g{i}" for i in range(4 - len(groups)))]
    return rk.SaliencyStats(layers, names, {**provenance, **more})


def test_save_and_load_are_inverse(tmp_path) -> None:
    stats = model()
    stats.save(tmp_path / "stats.safetensors")
    again = rk.SaliencyStats.load(tmp_path / "stats.safetensors")
    assert again.groups == stats.groups
    assert again.provenance == stats.provenance
    assert list(again.layers) == list(stats.layers)
    for name, layer in stats.layers.items():
        for key, value in layer.fields().items():
            assert torch.equal(again.layers[name].fields()[key], value)
    assert os.listdir(tmp_path) == ["stats.safetensors"]


def test_merge_joins_groups_by_name_and_data_in_order() -> None:
    a, b = model(seed=1), model(seed=5, groups=("chat", "math"))
    merged = a.merge(b)
    assert merged.groups == ["code", "chat", "g0", "g1", "math"]
    assert [entry["seed"] for entry in merged.provenance["data"]] == [1, 5]
    name = next(iter(a.layers))
    chat = a.layers[name].count[1] + b.layers[name].count[0]
    assert torch.equal(merged.layers[name].count[1], chat)
    assert torch.equal(merged.layers[name].count[4], b.layers[name].count[1])


def divided(seeds=(1, 5, 9), **more) -> rk.SaliencyStats:
    """Statistics of several shares, with the shares as parts."""
    parts = [model(seed=seed, **more) for seed in seeds]
    whole = functools.reduce(rk.SaliencyStats.merge, parts)
    parts = [rk.SaliencyStats(part.layers, part.groups, whole.provenance) for part in parts]
    return rk.SaliencyStats(whole.layers, whole.groups, whole.provenance, parts)


def assert_identical(a: rk.SaliencyStats, b: rk.SaliencyStats) -> None:
    assert (a.groups, a.provenance, list(a.layers)) == (b.groups, b.provenance, list(b.layers))
    for name, layer in a.layers.items():
        for key, value in layer.fields().items():
            assert torch.equal(b.layers[name].fields()[key], value), (name, key)


def test_parts_are_saved_with_the_whole(tmp_path) -> None:
    stats = divided()
    stats.save(tmp_path / "stats.safetensors")
    again = rk.SaliencyStats.load(tmp_path / "stats.safetensors")
    assert_identical(again, stats)
    assert len(again.parts) == 3
    for mine, read in zip(stats.parts, again.parts, strict=True):
        assert_identical(read, mine)
        assert read.parts == []


def test_a_file_whose_parts_are_gone_is_refused(tmp_path) -> None:
    path = tmp_path / "stats.safetensors"
    divided().save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={**metadata, "parts": "4"})
    with pytest.raises(DataError, match="incomplete"):
        rk.SaliencyStats.load(path)


def test_a_file_from_before_parts_loads(tmp_path) -> None:
    path = tmp_path / "stats.safetensors"
    stats = model()
    stats.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "parts"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=metadata)
    again = rk.SaliencyStats.load(path)
    assert_identical(again, stats)
    assert again.parts == []


def test_merging_merges_part_by_part() -> None:
    a, b = divided((1, 5)), divided((9, 13), groups=("chat", "math"))
    merged = a.merge(b)
    assert len(merged.parts) == 2
    for part, mine, theirs in zip(merged.parts, a.parts, b.parts, strict=True):
        assert_identical(part, mine.merge(theirs))
        assert part.groups == merged.groups
    parts = functools.reduce(rk.SaliencyStats.merge, merged.parts)
    for name, layer in merged.layers.items():
        assert_same(parts.layers[name], layer)


def test_merging_unlike_divisions_leaves_no_parts() -> None:
    assert divided((1, 5)).merge(divided((1, 5, 9))).parts == []
    assert divided((1, 5)).merge(model()).parts == []


def test_regrouping_adds_drops_and_leaves_empty() -> None:
    stats = observed([7])
    regrouped = stats.regrouped([2, None, 2, 0], 4)
    assert regrouped.num_groups == 4
    assert torch.equal(regrouped.count[2], stats.count[0] + stats.count[2])
    assert torch.equal(regrouped.count[0], stats.count[3])
    assert int(regrouped.count[[1, 3]].sum()) == 0
    with pytest.raises(ShapeError, match="grow_groups"):
        stats.regrouped([0, 1, 2, 4], 4)


@pytest.mark.parametrize(
    ("other", "field"),
    [({"digest": "sha256:b"}, "model"), ({"gate": "softmax"}, "gate")],
)
def test_merge_refuses_another_model(other: dict, field: str) -> None:
    with pytest.raises(DataError, match=f"cannot merge statistics: {field}"):
        model().merge(model(**other))


def test_nonfinite_rows_are_reported_with_layer_and_group() -> None:
    stats = model()
    stats.check_finite()
    stats.layers["model.layers.1.mlp.experts"].nonfinite[1, 3] = 7
    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.experts, group 'chat': 7 .*\[3\]"):
        stats.check_finite()


def test_load_refuses_what_is_not_statistics(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(DataError, match="cannot be read"):
        rk.SaliencyStats.load(path)
    path.write_bytes(b"no")
    with pytest.raises(DataError, match="cannot be read"):
        rk.SaliencyStats.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="not a statistics file"):
        rk.SaliencyStats.load(path)
    metadata = {"format": "reap-stats", "version": "1", "groups": json.dumps(["a"])}
    metadata |= {"layers": json.dumps(["layer"]), "provenance": "{}"}
    save_file({"layer|count": torch.zeros(1, 3, dtype=torch.int64)}, path, metadata=metadata)
    with pytest.raises(DataError, match="incomplete"):
        rk.SaliencyStats.load(path)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reap_kernels.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model().save(tmp_path / "stats.safetensors")
    assert os.listdir(tmp_path) == []


def test_empty_experts_keep_neutral_extrema() -> None:
    stats = rk.LayerStats(3)
    for name, neutral in zip(EXTREMA, (-torch.inf, torch.inf), strict=True):
        assert torch.equal(stats.fields()[name], torch.full((1, 3), neutral))
