"""What servers read and no plan is: rankings, placements and counts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reap_driver.interchange import (
    ascend_expert_list,
    ascend_expert_map,
    kept_maps,
    riy_profile,
    sglang_expert_location,
)
from reap_driver.interchange.content import ModelFacts, Source
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.planning.scoring import score
from reap_kernels.errors import DataError, PlanError
from tests.driver.interchange import facts
from tests.driver.planning.statistics import MODEL

RANKED = Source(facts.model(), facts.stats())


def lists(path: Path) -> dict[int, list[int]]:
    """The lists that vllm-ascend reads, with its checks."""
    found: dict[int, list[int]] = {}
    for line in path.read_text().splitlines():
        [(layer, ids)] = json.loads(line).items()
        assert int(layer) not in found
        assert len(set(ids)) == len(ids)
        found[int(layer)] = ids
    return found


@pytest.mark.parametrize("criterion", ["reap", "frequency"])
def test_all_experts_from_the_best_to_the_worst(tmp_path: Path, criterion: str) -> None:
    notes = ascend_expert_list.write(tmp_path / "l", replace(RANKED, criterion=criterion))
    assert notes == ["vllm-ascend prunes by a list only Qwen3-MoE models, and this one is m"]
    found, scores = lists(tmp_path / "l"), score(facts.stats(), criterion)
    assert list(found) == list(facts.NUMBERS)
    for number, name in zip(facts.NUMBERS, facts.NAMES, strict=True):
        assert sorted(found[number]) == list(range(facts.EXPERTS))
        values = [float(scores[name][expert]) for expert in found[number]]
        assert values == sorted(values, reverse=True)


def test_what_a_plan_keeps_comes_first(tmp_path: Path) -> None:
    plan = facts.plan()
    notes = ascend_expert_list.write(tmp_path / "l", replace(RANKED, plan=plan))
    assert '"expert_prune_ratio": 0.25}' in notes[1]
    found, scores = lists(tmp_path / "l"), score(facts.stats())
    for number, name in zip(facts.NUMBERS, facts.NAMES, strict=True):
        assert set(found[number][:4]) == set(plan.kept[name])
        for part in (found[number][:4], found[number][4:]):
            values = [float(scores[name][expert]) for expert in part]
            assert values == sorted(values, reverse=True)


def test_the_ratio_gives_the_number_of_the_plan() -> None:
    for experts in range(1, 600):
        for kept in range(1, experts + 1):
            ratio = ascend_expert_list.server_ratio(experts, kept)
            assert 0 <= ratio < 1
            assert int(experts * (1.0 - ratio)) == kept, (experts, kept)


def test_a_list_cannot_respect_groups(tmp_path: Path) -> None:
    grouped = Source(facts.model(n_group=2, topk_group=1), facts.stats(n_group=2))
    with pytest.raises(PlanError, match="chooses among 2 groups of experts"):
        ascend_expert_list.write(tmp_path / "l", grouped)


def placed(path: Path) -> list[list[list[int]]]:
    """[layer][device] of a map, with the checks of vllm-ascend."""
    content = json.loads(path.read_text())
    assert content["moe_layer_count"] == len(content["layer_list"])
    found = []
    for number, layer in enumerate(content["layer_list"]):
        assert layer["layer_id"] == number
        assert [one["device_id"] for one in layer["device_list"]] == list(
            range(layer["device_count"])
        )
        found.append([one["device_expert"] for one in layer["device_list"]])
    return found


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("devices", [1, 2])
def test_every_expert_has_one_place(tmp_path: Path, devices: int, planned: bool) -> None:
    source = replace(RANKED, ep=devices, plan=facts.plan() if planned else None)
    assert ascend_expert_map.write(tmp_path / "m", source) == []
    found, count = placed(tmp_path / "m"), 4 if planned else 6
    assert len(found) == len(facts.NAMES)
    for layer in found:
        assert {len(ids) for ids in layer} == {count // devices}
        assert sorted(e for ids in layer for e in ids) == list(range(count))


def test_loads_are_balanced() -> None:
    loads = [100, 50, 40, 30, 20, 10, 5, 1]
    found = ascend_expert_map.balanced(loads, 2)
    totals = [sum(loads[expert] for expert in ids) for ids in found]
    assert found == [[0, 4, 5, 7], [1, 2, 3, 6]]
    assert max(totals) < sum(loads[:4])  # as the experts lie


def test_devices_share_experts_out_equally(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"6 experts .* among 4 devices; give `ep` as one of 1, 2"):
        ascend_expert_map.write(tmp_path / "m", replace(RANKED, ep=4))


def test_counts_have_a_row_for_every_decoder_layer(tmp_path: Path) -> None:
    assert sglang_expert_location.write(tmp_path / "whole.json", RANKED) == []
    rows = json.loads((tmp_path / "whole.json").read_text())["logical_count"]
    plan = facts.plan()
    sglang_expert_location.write(tmp_path / "cut.json", replace(RANKED, plan=plan))
    cut = json.loads((tmp_path / "cut.json").read_text())["logical_count"]
    assert (len(rows), len(cut)) == (facts.DECODER_LAYERS, facts.DECODER_LAYERS)
    layers = dict(zip(facts.NUMBERS, facts.NAMES, strict=True))
    for number in range(facts.DECODER_LAYERS):
        if number not in layers:
            assert (rows[number], cut[number]) == ([0] * 6, [0] * 4)
            continue
        counts = facts.stats().layers[layers[number]].total().count[0].tolist()
        assert rows[number] == counts
        assert cut[number] == [counts[expert] for expert in plan.kept[layers[number]]]


WRITERS: dict[str, Any] = {
    "list": ascend_expert_list,
    "map": ascend_expert_map,
    "sglang": sglang_expert_location,
    "riy": riy_profile,
    "maps": kept_maps,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_plans_that_change_experts_are_refused(tmp_path: Path, writer: str) -> None:
    layers = {
        name: LayerPlan.keeping(6, (0, 1), width=3, neurons=((0, 1), (1, 2)))
        for name in facts.NAMES
    }
    narrow: Plan = replace(facts.plan(), layers=layers)
    with pytest.raises(PlanError, match=r"removes neurons of them.*reap-kernels apply"):
        WRITERS[writer].write(tmp_path / "f", replace(RANKED, plan=narrow, ep=2))
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("writer", ["list", "map", "sglang", "maps"])
def test_layers_that_keep_different_numbers_are_refused(tmp_path: Path, writer: str) -> None:
    uneven = facts.plan((0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3))
    with pytest.raises(PlanError, match="layers keep different numbers of experts"):
        WRITERS[writer].write(tmp_path / "f", replace(RANKED, plan=uneven, ep=2))


@pytest.mark.parametrize("writer", ["list", "map", "sglang"])
def test_statistics_of_some_layers_are_refused(tmp_path: Path, writer: str) -> None:
    some = facts.stats()
    del some.layers[facts.NAMES[1]]
    with pytest.raises(DataError, match=r"layer model\.layers\.2\..* is not in the statistics"):
        WRITERS[writer].write(tmp_path / "f", replace(RANKED, stats=some, ep=2))


def test_a_layer_is_left_out_only_where_it_follows_the_decoder_layers(tmp_path: Path) -> None:
    more = facts.stats()
    more.layers["model.layers.6.mlp.experts"] = more.layers[facts.NAMES[0]]
    sglang_expert_location.write(tmp_path / "f", replace(RANKED, stats=more))
    assert len(json.loads((tmp_path / "f").read_text())["logical_count"]) == facts.DECODER_LAYERS
    record = facts.model().record
    for model in (ModelFacts(record), ModelFacts(record, 7), ModelFacts({})):
        with pytest.raises(DataError, match="neither statistics nor model say how it routes"):
            replace(RANKED, stats=more, model=model).statistics()


def test_a_layer_that_is_recorded_as_mtp_is_left_out() -> None:
    more, name = facts.stats(), "model.layers.6.mlp.experts"
    more.layers[name] = more.layers[facts.NAMES[0]]
    layers = {**facts.model().layers, name: {**facts.model().layers[facts.NAMES[0]], "mtp": True}}
    found = Source(ModelFacts({"model": MODEL, "layers": layers}), more).all_statistics("list")
    assert list(found.layers) == list(facts.NAMES)


def test_layers_that_other_tools_cannot_number() -> None:
    layer = {"num_experts": 6, "top_k": 2}
    twice = ["vision.layers.0.experts", "text.layers.0.experts"]
    with pytest.raises(PlanError, match="both have the number 0"):
        ModelFacts({"model": MODEL, "layers": dict.fromkeys(twice, layer)}).numbers()
    with pytest.raises(PlanError, match="experts: has no number"):
        ModelFacts({"model": MODEL, "layers": {"experts": layer}}).numbers()


def test_a_criterion_that_is_not_recorded(tmp_path: Path) -> None:
    stats = facts.stats()
    for layer in stats.layers.values():
        layer.missing = frozenset({"norm_sq_sum"})
    with pytest.raises(DataError, match="norm_sq_sum, not recorded"):
        ascend_expert_list.write(tmp_path / "l", Source(facts.model(), stats, criterion="msan"))
    assert not (tmp_path / "l").exists()
