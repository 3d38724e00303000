"""Statistics: merge laws, groups, the file format and its refusals."""

import functools
import math
import os
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import reap_kernels as rk
from reap_kernels.errors import DataError, ShapeError
from reap_kernels.stats import EXTREMA, FIELDS, FORMAT, SUMS
from reap_kernels.testing import CASES, largest_relative_error, make_experts, make_inputs
from tests.sealed import change_tensors

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


def test_every_group_has_a_name() -> None:
    with pytest.raises(
        ShapeError, match=r"layer a has statistics of 2 groups, but .* 1: \['code'\]"
    ):
        rk.SaliencyStats({"a": rk.LayerStats(4, num_groups=2)}, ["code"])


def test_statistics_are_shown_without_their_numbers() -> None:
    layer = rk.LayerStats(4, num_groups=2)
    layer.add_tokens(7, group=1)
    assert repr(layer) == "LayerStats(num_experts=4, tokens=[0, 7])"
    stats = rk.SaliencyStats({"a": layer}, ["code", "chat"], {"model": {"id": "M"}})
    shown = "SaliencyStats(layers=1, groups=['code', 'chat'], parts=0, model='M')"
    assert repr(stats) == shown


def test_merge_joins_groups_by_name_and_data_in_order() -> None:
    a, b = model(seed=1), model(seed=5, groups=("chat", "math"))
    merged = a.merge(b)
    assert merged.groups == ["code", "chat", "g0", "g1", "math"]
    assert [entry["seed"] for entry in merged.provenance["data"]] == [1, 5]
    name = next(iter(a.layers))
    chat = a.layers[name].count[1] + b.layers[name].count[0]
    assert torch.equal(merged.layers[name].count[1], chat)
    assert torch.equal(merged.layers[name].count[4], b.layers[name].count[1])


@pytest.mark.parametrize("name", ["fused", "attention"])
def test_merge_keeps_what_changed_rounding_in_either(name: str) -> None:
    plain, other = model(), model(seed=5)
    other.provenance[name] = value = {"norm": 3} if name == "fused" else "cudnn"
    assert plain.merge(other).provenance[name] == value
    assert other.merge(plain).provenance[name] == value


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
    [
        ({"digest": "sha256:b"}, "config digest is sha256:b there and"),
        ({"gate": "softmax"}, "gate"),
    ],
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
    with pytest.raises(DataError, match=r"is not a statistics file.*reap-kernels observe"):
        rk.SaliencyStats.load(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="no regular file"):
        rk.SaliencyStats.load(tmp_path / "pipe")


def test_files_keep_their_names_of_fields(tmp_path) -> None:
    """What other programs read: no name of an attribute changes it."""
    divided((1, 5)).save(tmp_path / "s")
    names = ("count", "nonfinite", "gate_sum", "norm_sum", "gate_norm_sum", "norm_sq_sum",
             "gate_norm_sq_sum", "out_max", "out_min", "tokens")  # fmt: skip
    with safe_open(tmp_path / "s", framework="pt") as file:
        found = set(file.keys())
    layers = divided((1, 5)).layers
    assert found == {f"{a}|{p}{n}" for a in layers for p in ("", "parts|") for n in names}


def test_one_flipped_bit_anywhere_is_noticed(tmp_path) -> None:
    path = tmp_path / "s.safetensors"
    divided((1, 5)).save(path)
    good = path.read_bytes()
    draw = random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    places = [*range(8), *draw.sample(range(8, header), 250), *range(header - 8, header)]
    places += draw.sample(range(header, len(good)), 150)
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"s\.safetensors"):
            rk.SaliencyStats.load(path)
    path.write_bytes(good)
    rk.SaliencyStats.load(path)


LAYER = "model.layers.1.mlp.experts"


def change(field: str, value: float):
    """Puts a value into the second layer."""

    def apply(stats: rk.SaliencyStats) -> None:
        fields = stats.layers[LAYER].fields()[field]
        fields[1 if field == "tokens" else (1, 0)] = value

    return apply


def empty_expert(field: str, value: float):
    """An expert without rows that has a value all the same."""

    def apply(stats: rk.SaliencyStats) -> None:
        layer, neutral = stats.layers[LAYER], rk.LayerStats(1)
        for key, mine in layer.fields().items():
            if key != "tokens":
                mine[1, 0] = neutral.fields()[key][0, 0]
        change(field, value)(stats)

    return apply


WHERE = f"layer {LAYER}, group 1, expert 0: "
WRONG = {
    "negative count": (change("count", -1), WHERE + "count is -1; expected 0 to"),
    "huge count": (change("count", 2**62), WHERE + "count is 4611686018427387904"),
    "more rows than tokens": (change("count", 10**6), f"{LAYER}, group 1: tokens is .* over 4"),
    "negative nonfinite": (change("nonfinite", -3), WHERE + "nonfinite is -3"),
    "nonfinite beyond tokens": (change("nonfinite", 2**40), "group 1: tokens is"),
    "huge tokens": (change("tokens", 2**62), f"{LAYER}, group 1: tokens is 4611686018427387904"),
    "negative tokens": (change("tokens", -1), f"{LAYER}, group 1: tokens is -1"),
    "no tokens": (change("tokens", 0), f"{LAYER}, group 1: tokens is 0; expected no less"),
    **{f"nan {f}": (change(f, math.nan), WHERE + f"{f} is nan") for f in (*SUMS, *EXTREMA)},
    **{f"inf {f}": (change(f, math.inf), WHERE + f"{f} is inf") for f in (*SUMS, *EXTREMA)},
    **{
        f"negative {f}": (change(f, -1), WHERE + f"{f} is -1.0; expected 0 or more")
        for f in ("norm_sum", "norm_sq_sum", "weighted_norm_sq_sum")
    },
    **{
        f"empty {f}": (empty_expert(f, 1.5), WHERE + f"{f} is 1.5; expected .*no row was counted")
        for f in (*SUMS, *EXTREMA)
    },
    "large sum": (change("norm_sum", 1e9), WHERE + "norm_sum is .* root of count times norm_sq"),
    "large mean": (change("weighted_norm_sum", -1e9), WHERE + "weighted_norm_sum is -1000000000.0"),
    "extrema crossed": (change("out_max", -1e9), WHERE + "out_max is .*; expected out_min or more"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_numbers_that_no_observation_leaves_are_refused(tmp_path, wrong: str) -> None:
    spoil, message = WRONG[wrong]
    stats = model(layers={LAYER: {"num_experts": CASE.experts, "top_k": CASE.top_k}})
    stats.save(tmp_path / "s")
    rk.SaliencyStats.load(tmp_path / "s")
    spoil(stats)
    stats.save(tmp_path / "s")
    with pytest.raises(DataError, match=message) as caught:
        rk.SaliencyStats.load(tmp_path / "s")
    assert str(caught.value).startswith(f"statistics file {tmp_path / 's'}: ")


def test_tokens_that_overflow_when_groups_add_up(tmp_path) -> None:
    layer = rk.LayerStats(2, 3)
    layer.tokens.fill_(2**53 - 1)
    rk.SaliencyStats({"a": layer}, ["x", "y", "z"]).save(tmp_path / "s")
    with pytest.raises(DataError, match=r"layer a, group 0: tokens is .* in all groups"):
        rk.SaliencyStats.load(tmp_path / "s")


@pytest.mark.parametrize("field", FIELDS)
def test_parts_add_up(tmp_path, field: str) -> None:
    stats = divided((1, 5))
    stats.save(tmp_path / "s")
    rk.SaliencyStats.load(tmp_path / "s")
    values = stats.layers[LAYER].fields()[field]
    at = 1 if field == "tokens" else (1, 0)
    values[at] += 1 if values.dtype == torch.int64 else -1e-6 * values[at].abs()
    stats.save(tmp_path / "s")
    with pytest.raises(DataError, match=f"layer {LAYER}, group 1.*: {field} is .* its parts"):
        rk.SaliencyStats.load(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ["a", "a"]}, "field 'layers' has a name twice"),
        ({"layers": ["a", "b"]}, r"tensor 'b\|count' is missing"),
        ({"layers": []}, r"the tensor 'a\|count', which no layer has"),
        ({"groups": ["x", "x"]}, "field 'groups' has a name twice"),
        ({"groups": []}, "field 'groups' has 0 entries"),
        ({"groups": ["x"]}, r"tensor 'a\|count' is torch.int64 \[2, 3\]; expected .* \[1, 3\]"),
        ({"groups": [f"{n}" for n in range(10**5)]}, r"expected torch.int64 \[100000, 3\]"),
        ({"parts": 10**9}, "field 'parts' is 1000000000"),
        ({"parts": 1}, r"tensor 'a\|parts\|count' is missing"),
        ({"provenance": {"layers": {"a": {"num_experts": 4}}}}, "layer a: num_experts is 4"),
        ({"provenance": {"layers": {"a": {"top_k": -1}}}}, "'provenance.layers.a.top_k' is -1"),
        ({"provenance": {"layers": {"a": 1}}}, "'provenance.layers.a' is 1; expected an object"),
        ({"provenance": {"model": "m"}}, "'provenance.model' is 'm'; expected an object"),
        ({"provenance": {"data": {}}}, "'provenance.data' is {}; expected a list"),
        ({"provenance": {"data": [{"tokens": 1.5}]}}, r"'provenance.data\[0\].tokens' is 1.5"),
        ({"provenance": {"unobserved": "a"}}, "'provenance.unobserved' is 'a'"),
        ({"provenance": {"software": []}}, r"'provenance.software' is \[\]"),
        ({"provenance": {"served": {"a": "cpu"}}}, "'provenance.served.a' is 'cpu'"),
    ],
)
def test_heads_that_do_not_fit_are_refused(tmp_path, change: dict, message: str) -> None:
    rk.SaliencyStats({"a": rk.LayerStats(3, 2)}, ["x", "y"]).save(tmp_path / "s")
    rk.SaliencyStats.load(tmp_path / "s")
    change_tensors(tmp_path / "s", FORMAT, change, {})
    with pytest.raises(DataError, match=message):
        rk.SaliencyStats.load(tmp_path / "s")


def test_provenance_that_could_not_be_read_is_not_saved(tmp_path) -> None:
    for wrong in ({"data": [{"tokens": math.inf}]}, {"model": {"id": 3}}, {"x": {1}}):
        with pytest.raises(DataError, match="statistics file"):
            model(**wrong).save(tmp_path / "s")
    assert os.listdir(tmp_path) == []


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
