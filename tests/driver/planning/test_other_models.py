"""A plan made from one model and applied to another: what decides, and what is only noted."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PretrainedConfig

import reap_driver as rd
from reap_driver.compat.pretrained import meta_model
from reap_driver.model.discover import find_moe_layers, record_of
from reap_driver.planning.plan import Plan
from reap_driver.reporting.inputs import Inputs
from reap_driver.writer.plan_checks import check_model, check_same_layers
from reap_kernels import LayerStats, SaliencyStats
from reap_kernels.errors import DataError, PlanError
from tests.driver import zoo
from tests.driver.writer import saved
from tests.driver.zoo.build import make_config
from tests.driver.zoo.core import CORE

# What fine-tuned models of a family change.
NOTED = {
    "eos_token_id": [7, 9],
    "bos_token_id": 5,
    "max_position_embeddings": 333,
    "rope_theta": 12345.0,
    "vocab_size": 300,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": True,
}
# What makes another model of it.
DECIDES = {
    "num_experts_per_tok": ("top_k", 2),
    "hidden_size": ("hidden_size", 64),
    "moe_intermediate_size": ("intermediate_size", 20),
}


def config(name: str = "qwen3_moe", **changed: Any) -> PretrainedConfig:
    return make_config(CORE[name], changed)


def record(known: PretrainedConfig) -> dict[str, Any]:
    model = meta_model(known)
    return record_of(model, find_moe_layers(model), "acme/tuned")


def statistics(known: PretrainedConfig, name: str = "acme/base") -> SaliencyStats:
    """Statistics of a model that never ran, every score another."""
    model = meta_model(known)
    layers = find_moe_layers(model)
    stats = {layer.name: LayerStats(layer.num_experts) for layer in layers}
    for layer in stats.values():
        layer.tokens += 9
        layer.count.add_(3)
        layer.weighted_norm_sum.copy_(torch.arange(1.0, 1 + layer.num_experts))
    provenance = {**record_of(model, layers, name), "gate": "model"}
    return SaliencyStats(stats, ["default"], provenance)


def plan_for(known: PretrainedConfig) -> Plan:
    return rd.make_plan(rd.score(statistics(known)), 0.5)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_for(config())


def test_the_same_model_leaves_no_note(plan: Plan) -> None:
    assert check_model(plan, record(config()), "here") == []


@pytest.mark.parametrize("field", NOTED)
def test_what_does_not_decide_is_noted_by_field(plan: Plan, field: str) -> None:
    [note] = check_model(plan, record(config(**{field: NOTED[field]})), "acme/tuned")
    assert note.startswith("made for acme/base (there), applied to acme/tuned (here): ")
    assert field in note


@pytest.mark.parametrize("field", DECIDES)
def test_what_decides_is_refused_by_field_and_can_be_forced(plan: Plan, field: str) -> None:
    fact, value = DECIDES[field]
    other = record(config(**{field: value}))
    with pytest.raises(
        PlanError,
        match=rf"no match for here: {fact} is .* there and {value} here.*"
        r"model\.layers\.0\.mlp\.experts and 1 more.*`force_model=True`",
    ):
        check_model(plan, other, "here")
    [note] = check_model(plan, other, "here", force=True)
    assert "applied by force" in note
    assert f"{fact} is" in note


def test_statistics_of_another_tool_record_no_model() -> None:
    """They say how layers route, which is compared; that the model is the same, the user says."""
    stats = statistics(config())
    del stats.provenance["model"]
    plan = rd.make_plan(rd.score(stats), 0.5)
    with pytest.raises(
        PlanError, match=r"record no model.* of here .*`force_model=True`.*record_of"
    ):
        check_model(plan, record(config()), "here")
    [note] = check_model(plan, record(config()), "acme/tuned", force=True)
    assert note == "made from statistics that record no model, applied to acme/tuned by force"
    with pytest.raises(PlanError, match="no match for here: top_k is"):
        check_model(plan, record(config(num_experts_per_tok=1)), "here")


def test_routing_groups_decide() -> None:
    grouped = plan_for(config("deepseek_v3", n_group=2, topk_group=2))
    other = record(config("deepseek_v3", n_group=1, topk_group=1))
    with pytest.raises(PlanError, match="n_group is 2 there and 1 here"):
        check_model(grouped, other, "here")


def test_every_layer_is_compared() -> None:
    stats = statistics(config())
    facts = stats.provenance["layers"]
    second = list(facts)[1]
    facts[second] = {**facts[second], "top_k": 1}
    plan = rd.make_plan(rd.score(stats), 0.5)
    with pytest.raises(PlanError, match=rf"top_k is 1 there and \d here \({second}\)"):
        check_model(plan, record(config()), "here")


@pytest.mark.parametrize(
    "changed", [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"num_experts": 16}]
)
def test_other_layers_or_experts_are_refused_whatever_is_forced(
    plan: Plan, changed: dict[str, int]
) -> None:
    model = meta_model(config(**changed))
    with pytest.raises(PlanError, match=r"statistics of this model|plan every one"):
        check_same_layers(plan, find_moe_layers(model))


def test_plans_of_before_say_that_digests_differ(plan: Plan, tmp_path: Path) -> None:
    old = {key: plan.model[key] for key in ("id", "config_digest", "model_type", "architecture")}
    dataclasses.replace(plan, model=old).save(tmp_path / "old.json")
    loaded = Plan.load(tmp_path / "old.json")
    assert check_model(loaded, record(config()), "here") == []
    other = record(config(eos_token_id=7))
    with pytest.raises(PlanError, match=r"config digest is sha256:\w+ there .*not recorded"):
        check_model(loaded, other, "here")
    [note] = check_model(loaded, other, "here", force=True)
    assert "config digest is" in note


def test_a_plan_of_the_base_model_is_applied_and_the_difference_recorded(
    plan: Plan, tmp_path: Path
) -> None:
    saved.save("qwen3_moe", tmp_path / "tuned", eos_token_id=7)
    report = rd.apply_plan(tmp_path / "tuned", plan, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    [note] = report.plan.notes
    assert "eos_token_id is 2 there and 7 here" in note
    assert note in card
    assert plan.notes == []
    masked = rd.save_masks(tmp_path / "tuned", plan, tmp_path / "masks")
    assert masked.notes == [note]
    with safe_open(tmp_path / "masks", framework="pt") as file:
        assert json.loads(file.metadata()["reap-masks"])["notes"] == [note]


def test_a_forced_plan_says_so_in_the_card(plan: Plan, tmp_path: Path) -> None:
    saved.save("qwen3_moe", tmp_path / "other", num_experts_per_tok=2)
    with pytest.raises(PlanError, match="top_k is 3 there and 2 here"):
        rd.apply_plan(tmp_path / "other", plan, tmp_path / "out")
    with pytest.raises(PlanError, match="top_k is 3 there and 2 here"):
        rd.save_masks(tmp_path / "other", plan, tmp_path / "masks")
    report = rd.apply_plan(tmp_path / "other", plan, tmp_path / "out", force_model=True)
    [note] = report.plan.notes
    assert "applied by force to other (here): top_k is 3 there and 2 here" in note
    assert note in (tmp_path / "out" / "README.md").read_text()
    rd.save_masks(tmp_path / "other", plan, tmp_path / "masks", force_model=True)


def test_a_search_takes_scores_of_the_base_model() -> None:
    _, model = zoo.tiny("qwen3_moe", eos_token_id=7)
    scores = rd.score(statistics(config()))
    batches = [{"input_ids": torch.arange(3, 35)[None]}]
    settings = _quick()
    found = rd.search_plan(model, scores, batches, 0.25, settings=settings)
    assert any("eos_token_id is 2 there and 7 here" in note for note in found.notes)
    _, model = zoo.tiny("qwen3_moe", num_experts_per_tok=2)
    with pytest.raises(PlanError, match="top_k is 3 there and 2 here"):
        rd.search_plan(model, scores, batches, 0.25, settings=settings)
    found = rd.search_plan(model, scores, batches, 0.25, settings=settings, force_model=True)
    assert any("by force" in note for note in found.notes)


def _quick() -> Any:
    from reap_driver.plan_search.evolution import Settings

    return Settings(evaluations=6, population=4, elites=2, seed=0)


def test_a_report_shows_a_plan_of_the_base_model(plan: Plan) -> None:
    stats = statistics(config(eos_token_id=7), "acme/tuned")
    notes = Inputs.checked(stats, plan, None).notes()
    assert any("eos_token_id is 2 there and 7 here" in note for note in notes)
    with pytest.raises(PlanError, match="top_k is 3 there and 2 here"):
        Inputs.checked(statistics(config(num_experts_per_tok=2)), plan, None)


def test_merging_statistics_follows_the_same_rule() -> None:
    base, tuned = statistics(config()), statistics(config(eos_token_id=7), "acme/tuned")
    merged = base.merge(tuned)
    [note] = merged.provenance["notes"]
    assert "'acme/tuned' (there)" in note
    assert "eos_token_id is 7 there and 2 here" in note
    assert rd.make_plan(rd.score(merged), 0.5).notes == [note]
    with pytest.raises(DataError, match="cannot merge statistics: top_k is 2 there and 3 here"):
        base.merge(statistics(config(num_experts_per_tok=2)))
