"""Plans: made from scores, saved, loaded, and every way a file can be wrong."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from reap_driver.planning.criteria import Scores
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.planning.planner import make_plan, plan_keeping, plan_of_removals, random_plan
from reap_driver.planning.scoring import score
from reap_kernels.errors import PlanError
from tests.driver.planning.statistics import EXPERTS, MODEL, Rows, model_stats

LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


def scores(**facts: int) -> Scores:
    rows = {name: Rows(2, seed) for seed, name in enumerate(LAYERS)}
    stats = model_stats(rows, ["x", "y"], **facts)
    stats.provenance["data"] = [{"group": "x", "source": "x.jsonl", "tokens": 5}]
    return score(stats, "reap", {"x": 0.25, "y": 0.75})


def test_a_plan_keeps_the_best_and_says_why() -> None:
    known = scores()
    plan = make_plan(known, 0.5)
    for name in LAYERS:
        best = sorted(known[name].argsort(descending=True)[:3].tolist())
        assert plan.layers[name].kept == plan.kept[name] == tuple(best)
        assert sorted(plan.layers[name].kept + plan.layers[name].removed) == list(range(EXPERTS))
    routing = {"num_experts": EXPERTS, "top_k": 2, "n_group": 1, "topk_group": 1}
    assert plan.model == {**MODEL, "layers": dict.fromkeys(LAYERS, routing)}
    assert (plan.criterion, plan.allocation, plan.ratio) == ("reap", "uniform", 0.5)
    assert plan.scores_digest == known.digest()
    assert plan.weights == {"x": 0.25, "y": 0.75}
    assert plan.data == [{"group": "x", "source": "x.jsonl", "tokens": 5}]
    assert plan.notes == []


def test_rounding_by_groups_is_noted() -> None:
    plan = make_plan(scores(n_group=2, topk_group=1, top_k=1), 0.5)
    assert {len(layer.removed) for layer in plan.layers.values()} == {2}
    assert plan.notes == [
        "removes 2 instead of 3 of 6 experts a layer: the 2 routing groups must stay equal in size"
    ]


def test_more_than_the_paper_measured_is_noted() -> None:
    assert make_plan(scores(), 4 / 6).notes == [MUCH]


def test_round_trip(tmp_path: Path) -> None:
    plan = make_plan(scores(), 1 / 3)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["format"] == "reap-plan"
    assert content["version"] == 1
    assert set(content["layers"][LAYERS[0]]) == {"num_experts", "kept", "removed"}


def test_saving_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(scores(), 0.5)
    plan.save(tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        dataclasses.replace(plan, notes=["new"]).save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_bytes() == before


MUCH = (
    "removes 67% of the experts; the results of REAP's paper end at 50%, so compare the result "
    "with the original before you use it"
)
UNEVEN = (
    "layers keep from 1 to 5 experts: transformers' own from_pretrained, vLLM and SGLang read one "
    "number for all layers and refuse such a checkpoint; `apply --non-uniform` writes it for "
    "reap_driver to load"
)


def test_a_global_plan_keeps_the_best_of_all_layers(tmp_path: Path) -> None:
    known = scores(top_k=1)
    known[LAYERS[1]] = known[LAYERS[0]] + 1000
    plan = make_plan(known, 0.5, allocation="global", normalize="none")
    assert [len(plan.kept[name]) for name in LAYERS] == [1, 5]
    assert plan.kept[LAYERS[0]] == (int(known[LAYERS[0]].argmax()),)
    assert plan.layers[LAYERS[1]].removed == (int(known[LAYERS[1]].argmin()),)
    assert (plan.allocation, plan.settings) == ("global", {"normalise": "none"})
    assert plan.notes == [UNEVEN]
    assert not plan.uniform
    assert plan == make_plan(known, 0.5, allocation="global", normalize="none")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    default = make_plan(known, 0.5, allocation="global")
    assert default.settings == {"normalise": "mean"}
    assert default == make_plan(known, 0.5, allocation="global", normalize="mean")


def test_a_global_plan_that_falls_short_says_so() -> None:
    plan = make_plan(scores(), 0.75, allocation="global")  # two of six stay in both layers
    assert [len(plan.kept[name]) for name in LAYERS] == [2, 2]
    assert plan.uniform
    assert plan.notes == [
        "removes 8 instead of 9 of 12 experts: routers need as many as they choose, and routing "
        "groups stay equal in size",
        MUCH,
    ]
    plan = make_plan(scores(), 0.75, allocation="global", layer_ratios={LAYERS[0]: 0.5})
    starts = [note.partition(" experts")[0] for note in plan.notes]
    assert starts == ["layers keep from 2 to 3", "removes 58% of the"]
    assert [len(plan.kept[name]) for name in LAYERS] == [3, 2]


def test_protected_experts_and_ratios_are_recorded(tmp_path: Path) -> None:
    known = scores()
    worst = int(known[LAYERS[0]].argmin())
    plan = make_plan(known, 0.5, protected={LAYERS[0]: {worst}}, layer_ratios={LAYERS[1]: 0})
    assert worst in plan.kept[LAYERS[0]]
    assert plan.layers[LAYERS[1]].removed == ()
    assert plan.settings == {"layer_ratios": {LAYERS[1]: 0}, "protected": {LAYERS[0]: [worst]}}
    assert not plan.uniform
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_plans_of_given_removals() -> None:
    known = scores()
    plan = plan_of_removals(known, {LAYERS[1]: 4, LAYERS[0]: 1}, allocation="searched", ratio=0.42)
    assert (plan.allocation, plan.ratio, plan.criterion) == ("searched", 0.42, "reap")
    assert list(plan.layers) == list(LAYERS)
    for name, removed in ((LAYERS[0], 1), (LAYERS[1], 4)):
        lowest = known[name].argsort()[:removed].tolist()
        assert plan.layers[name].removed == tuple(sorted(lowest))
    assert plan.scores_digest == known.digest()
    same = plan_of_removals(known, dict.fromkeys(LAYERS, 3), allocation="uniform", ratio=0.5)
    assert same == make_plan(known, 0.5)
    guarded = plan_of_removals(
        known,
        {LAYERS[0]: 4, LAYERS[1]: 0},
        allocation="searched",
        ratio=0.3,
        protected={LAYERS[0]: plan.layers[LAYERS[0]].removed},
    )
    assert set(plan.layers[LAYERS[0]].removed) <= set(guarded.kept[LAYERS[0]])
    with pytest.raises(PlanError, match="removing 5 of the 6 experts"):
        plan_of_removals(known, dict.fromkeys(LAYERS, 5), allocation="searched", ratio=0.5)
    with pytest.raises(PlanError, match="removals are 0 in every layer"):
        plan_of_removals(known, dict.fromkeys(LAYERS, 0), allocation="searched", ratio=0.5)


def test_plans_that_keep_a_number_or_all() -> None:
    known = scores()
    assert plan_keeping(known, 3, ratio=0.5) == make_plan(known, 0.5)
    whole = plan_keeping(known, 6, ratio=0.25)
    assert (whole.ratio, whole.uniform) == (0.25, True)
    assert {layer.removed for layer in whole.layers.values()} == {()}
    with pytest.raises(PlanError, match="removing 5 of the 6 experts"):
        plan_keeping(known, 1, ratio=0.5)


def test_uniform_means_one_number_for_layers_of_one_size() -> None:
    def plan(*counts: tuple[int, int]) -> Plan:
        layers = {
            str(place): LayerPlan.keeping(experts, tuple(range(kept)))
            for place, (experts, kept) in enumerate(counts)
        }
        return Plan({}, "reap", "uniform", 0.5, layers, "")

    assert plan((8, 4), (8, 4)).uniform
    assert plan((8, 4), (16, 8), (8, 4)).uniform
    assert not plan((8, 4), (8, 8)).uniform
    assert not plan((8, 4), (16, 8), (16, 4)).uniform


def test_random_plans_are_seeded_and_differ() -> None:
    known = scores()
    plans = [random_plan(known, 0.5, seed) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0].kept != plans[2].kept
    assert plans[0].criterion == "random:0"
    assert plans[0].model == make_plan(known, 0.5).model
    # The same on every machine: the values are written down.
    assert plans[0].kept == {LAYERS[0]: (0, 1, 4), LAYERS[1]: (0, 3, 4)}


def test_random_plans_use_all_experts_alike() -> None:
    known, kept = scores(), torch.zeros(EXPERTS)
    for seed in range(400):
        for layer in random_plan(known, 0.5, seed).layers.values():
            kept[list(layer.kept)] += 1
    assert kept.sum() == 400 * 2 * 3
    assert (kept / 400 - 1).abs().max() < 0.12  # 3.4 standard deviations of a fair draw


def test_random_plans_respect_groups() -> None:
    known = scores(n_group=2, topk_group=1, top_k=1)
    for seed in range(20):
        for layer in random_plan(known, 0.4, seed).layers.values():
            assert sum(expert < 3 for expert in layer.kept) == 2


@pytest.mark.parametrize(
    ("kept", "removed", "says"),
    [
        ((0, 1), (2,), "do not share out"),  # 3 is nowhere
        ((0, 1), (1, 2, 3), "do not share out"),
        ((0, 4), (1, 2, 3), "do not share out"),
        ((-1, 0), (1, 2, 3), "do not share out"),
        ((1, 0), (2, 3), "not ascending"),
        ((0, 0), (1, 2, 3), "not ascending"),
        ((), (0, 1, 2, 3), "kept is empty"),
        ((False, True), (2, 3), "kept holds other things than expert ids"),
        (("0", "1"), (2, 3), "kept holds other things"),
    ],
)
def test_kept_and_removed_share_out_the_experts(
    kept: tuple[int, ...], removed: tuple[int, ...], says: str
) -> None:
    with pytest.raises(PlanError, match=says):
        LayerPlan(4, kept, removed)


LAYER = f"layers.{LAYERS[0]}"
FIELDS = (
    "model",
    "criterion",
    "weights",
    "allocation",
    "ratio",
    "scores_digest",
    "data",
    "notes",
    "layers",
)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_needed(tmp_path: Path, field: str) -> None:
    path, content = saved(tmp_path)
    del content[field]
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=rf"plan.json: field '{field}' is missing"):
        Plan.load(path)


@pytest.mark.parametrize("field", ["num_experts", "kept", "removed"])
def test_every_field_of_a_layer_is_needed(tmp_path: Path, field: str) -> None:
    path, content = saved(tmp_path)
    del content["layers"][LAYERS[0]][field]
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=rf"plan.json: field '{LAYER}.{field}' is missing"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("format", "reap-stats", "is not a plan"),
        ("version", 2, "version 2.*reads 1"),
        ("version", None, "version None"),
        ("ratio", "half", "field 'ratio' is 'half'"),
        ("ratio", True, "field 'ratio' is True"),
        ("ratio", 1.5, "'ratio' is 1.5; expected a finite number, above 0, below 1"),
        ("ratio", 0, "'ratio' is 0"),
        ("model", [], r"field 'model' is \[\]; expected an object"),
        ("model", {"id": 3}, "field 'model.id' is 3; expected a text"),
        ("weights", [], r"field 'weights' is \[\]"),
        ("weights", {"x": -1}, "field 'weights.x' is -1; expected a finite number, 0 or more"),
        ("data", [1], r"field 'data\[0\]' is 1; expected an object"),
        ("data", [{"tokens": "5"}], r"field 'data\[0\].tokens' is '5'"),
        ("data", [{"records": -1}], r"field 'data\[0\].records' is -1"),
        ("data", [{"source": ["x"]}], r"field 'data\[0\].source' is \['x'\]"),
        ("notes", [1], r"field 'notes\[0\]' is 1"),
        ("layers", {}, "'layers' has 0 entries"),
        ("layers", {"a": [1]}, r"'layers.a' is \[1\]; expected an object"),
        ("settings", [], r"field 'settings' is \[\]; expected an object"),
        ("settings", {"normalize": "max"}, "field 'settings.normalize' is unknown"),
        ("settings", {"normalise": "min"}, "field 'settings.normalise' is 'min'; expected one of"),
        ("settings", {"layer_ratios": {"a": 1}}, "'settings.layer_ratios.a' is 1; expected"),
        ("more", 1, "field 'more' is unknown"),
        (f"{LAYER}.kept", [0, 1, 2, 3, "4"], rf"field '{LAYER}.kept\[4\]' is '4'"),
        (f"{LAYER}.kept", [0, True], rf"field '{LAYER}.kept\[1\]' is True"),
        (f"{LAYER}.num_experts", 10**9, rf"field '{LAYER}.num_experts' is 1000000000"),
        (f"{LAYER}.num_experts", 10**6, "do not share out"),
        (f"{LAYER}.kept", [0, 1], "do not share out"),
        (f"{LAYER}.removed", [5, 4, 3], "not ascending"),
        (f"{LAYER}.num_experts", 7, "do not share out"),
        (f"{LAYER}.num_experts", 6.0, rf"field '{LAYER}.num_experts' is 6.0"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, field: str, value: Any, says: str) -> None:
    path, content = saved(tmp_path)
    if field.startswith(LAYER):
        content["layers"][LAYERS[0]][field.rpartition(".")[2]] = value
    else:
        content[field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=says) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("make it again with `reap-kernels plan`")


@pytest.mark.parametrize(
    "protected",
    [[1], {"z": [1]}, {LAYERS[0]: 1}, {LAYERS[0]: ["1"]}, {LAYERS[0]: [6]}, {LAYERS[0]: "removed"}],
)
def test_protected_experts_are_kept(tmp_path: Path, protected: Any) -> None:
    path, content = saved(tmp_path)
    if isinstance(protected, dict) and protected.get(LAYERS[0]) == "removed":
        protected = {LAYERS[0]: content["layers"][LAYERS[0]]["removed"][:1]}
    content["settings"] = {"protected": protected}
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"plan.json: (field ')?settings.protected"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "is not JSON"), ("{", "is not JSON"), ("[]", "is not a plan"), ("\xff\xfe", "not UTF-8")],
)
def test_files_that_are_no_plans(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanError, match=says):
        Plan.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"id": 3}},
        {"notes": [None]},
        {"ratio": 2.0},
        {"weights": {"x": float("nan")}},
        {"data": [{"tokens": -1}]},
        {"data": [{"mine": {1, 2}}]},
        {"settings": {"protect": {}}},
    ],
    ids=str,
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, change: dict[str, Any]) -> None:
    plan = dataclasses.replace(make_plan(scores(), 0.5), **change)
    with pytest.raises(PlanError, match=f"plan.*{next(iter(change))}|cannot be written"):
        plan.save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_not_utf_8_is_written_with_question_marks(tmp_path: Path) -> None:
    plan = dataclasses.replace(make_plan(scores(), 0.5), model={"id": "models/\udcff"})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").model == {"id": "models/?"}


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none.json cannot be read \(No such file"):
        Plan.load(tmp_path / "none.json")


def test_what_cannot_be_planned() -> None:
    with pytest.raises(
        PlanError, match=r"allocation 'best' is unknown; choose one of uniform, global"
    ):
        make_plan(scores(), 0.5, allocation="best")
    for wrong in ({"protected": {"z": [1]}}, {"layer_ratios": {"z": 0.5}}):
        with pytest.raises(PlanError, match="layer 'z' is none of the 2 MoE layers"):
            make_plan(scores(), 0.5, **wrong)
    with pytest.raises(PlanError, match="normalize 'max' has no effect on uniform allocation"):
        make_plan(scores(), 0.5, normalize="max")
    with pytest.raises(PlanError, match="nothing is removed"):
        make_plan(scores(), 0.5, layer_ratios=dict.fromkeys(LAYERS, 0))
    known = scores()
    known.layers = {}
    with pytest.raises(PlanError, match=r"layer model.layers.0.mlp.experts: the statistics do not"):
        make_plan(known, 0.5)
    known = scores()
    known.unobserved = ["model.layers.1.vision"]
    with pytest.raises(PlanError, match=r"layer model.layers.1.vision .* reached by no token"):
        make_plan(known, 0.5)


VISION = "model.layers.1.vision"


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_unreached_layers_of_another_count_stay_whole(allocation: str) -> None:
    """With a note; and so do those whose count is shared, once somebody says so."""
    known = scores()
    known.unobserved = [VISION]
    known.stacks = {"text.num_experts": [*LAYERS], "vision.num_experts": [VISION]}
    plan = make_plan(known, 0.5, allocation=allocation)
    assert tuple(plan.layers) == LAYERS
    assert plan.notes[-1].endswith(f"reached by no token and keep all experts: {VISION}")
    known.stacks = {"num_experts": [*LAYERS, VISION]}
    with pytest.raises(PlanError, match="num_experts counts them together with those of"):
        make_plan(known, 0.5, allocation=allocation)
    told = make_plan(known, 0.5, allocation=allocation, layer_ratios={VISION: 0})
    assert (told.kept, told.settings["layer_ratios"]) == (plan.kept, {VISION: 0})
    with pytest.raises(PlanError, match=rf"{VISION} was reached by no token, .* lose some \(0.5\)"):
        make_plan(known, 0.5, allocation=allocation, layer_ratios={VISION: 0.5})
    removals = {name: len(layer.removed) for name, layer in plan.layers.items()}
    named = {"allocation": "searched", "ratio": 0.5}
    with pytest.raises(PlanError, match="reached by no token"):
        plan_of_removals(known, removals, **named)
    assert plan_of_removals(known, {**removals, VISION: 0}, **named).kept == plan.kept


def test_an_unreached_layer_beside_layers_that_lose_nothing() -> None:
    """Whose count it shares is what matters, not that any layer is cut."""
    known = scores()
    known.unobserved = [VISION]
    known.stacks = {"a": [LAYERS[0]], "b": [LAYERS[1], VISION]}
    plan = make_plan(known, 0.5, layer_ratios={LAYERS[1]: 0})
    assert len(plan.layers[LAYERS[1]].kept) == plan.layers[LAYERS[1]].num_experts
    with pytest.raises(PlanError, match="b counts them together"):
        make_plan(known, 0.5, layer_ratios={LAYERS[0]: 0})


def saved(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A plan's file and its content, to be spoiled."""
    path = folder / "plan.json"
    make_plan(scores(), 0.5).save(path)
    return path, json.loads(path.read_text())
