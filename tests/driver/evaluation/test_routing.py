"""What a plan does to the routing of the original equals what the tests count by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import reap_driver as rd
from reap_driver.base.interrupts import Stop
from reap_driver.compat.text_model import text_model
from reap_driver.evaluation.routing import RoutingObserver, orphans, orphans_of_each
from reap_driver.load.streamed_model import open_streamed
from reap_driver.observation.run import BatchList, Run, run_streamed
from reap_driver.observation.state_store import StateStore
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.planning.retained import retained
from reap_kernels import SaliencyStats
from reap_kernels.errors import PlanError, UnsupportedModel
from tests.driver import zoo
from tests.driver.observation import oracle, remote_blocks


def plan_for(model: Any, kept: tuple[int, ...] = (0, 2, 5)) -> Plan:
    """A plan that keeps different experts in every layer."""
    layers = {}
    for number, layer in enumerate(rd.find_moe_layers(model)):
        ids = sorted({(e + number) % layer.num_experts for e in kept})
        layers[layer.name] = LayerPlan.keeping(layer.num_experts, tuple(ids))
    return Plan({"id": "acme/tiny"}, "reap", "uniform", 0.5, layers, "sha256:0")


def by_hand(calls: oracle.Calls, removed: tuple[int, ...], counts: torch.Tensor) -> list[float]:
    """Tokens, orphaned, stranded and router weight share, counted token by token."""
    found = [0.0, 0.0, 0.0, 0.0]
    (call,) = calls.inputs
    for ids, gates, counted in zip(call[1].tolist(), call[2].tolist(), counts, strict=True):
        slots = [(gate, expert) for expert, gate in zip(ids, gates, strict=True) if gate]
        if not slots or not counted:
            continue
        first = max(slots, key=lambda slot: slot[0])[1]
        found[0] += 1
        found[1] += first in removed
        found[2] += all(expert in removed for _, expert in slots)
        total = sum(gate for gate, _ in slots)
        found[3] += sum(gate for gate, expert in slots if expert not in removed) / total
    found[3] = found[3] / found[0] if found[0] else 1.0
    return found


@pytest.mark.parametrize("name", [name for name in zoo.names() if name != "aria_text"])
def test_orphans_are_those_counted_by_hand(name: str) -> None:
    config, model = zoo.tiny(name)
    inputs, plan = zoo.tiny_inputs(name, config), plan_for(model)
    with oracle.recorded(model, list(plan.layers)) as calls, torch.no_grad():
        text_model(model)(**inputs)
    token_mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    token_mask[1, 7:] = False
    for mask in (None, token_mask):
        given = inputs if mask is None else {**inputs, "token_mask": mask}
        found = orphans(model, [given], plan)
        assert list(found) == list(plan.layers)
        for layer, seen in found.items():
            if not calls[layer].inputs:  # vision experts, a talker's
                assert (seen.tokens, seen.rate, seen.router_weight_share) == (0, 0.0, 1.0)
                continue
            want = by_hand(
                calls[layer], plan.layers[layer].removed, token_mask.flatten() | (mask is None)
            )
            assert [seen.tokens, seen.orphaned, seen.stranded] == want[:3]
            assert seen.router_weight_share == pytest.approx(want[3], rel=1e-6)
    assert any(seen.orphaned for seen in found.values())


def test_following_changes_no_statistics() -> None:
    config, model = zoo.tiny("qwen3_moe")
    inputs = zoo.tiny_inputs("qwen3_moe", config)
    with RoutingObserver(model, plan_for(model)) as follower:
        followed = follower(**inputs).logits
        follower(**inputs)
    with rd.observe(model) as obs:
        plain = obs(**inputs).logits
        obs(**inputs)
    assert torch.equal(followed, plain)
    for name, layer in obs.stats.layers.items():
        assert torch.equal(layer.sums, follower.stats.layers[name].sums)
    assert all(seen.tokens == 48 for seen in follower.orphans.values())


def test_blocks_that_route_inline_are_refused() -> None:
    model = remote_blocks.remote("inline")
    with pytest.raises(UnsupportedModel, match="does not show which token goes to which expert"):
        RoutingObserver(model, plan_for(model))


@pytest.fixture
def observed() -> tuple[SaliencyStats, Plan]:
    config, model = zoo.tiny("qwen3_moe")
    with rd.observe(model) as obs:
        obs(**zoo.tiny_inputs("qwen3_moe", config, batch=1, seq=4))
    return obs.stats, plan_for(model)


def test_retained_is_the_kept_experts_share(observed: tuple[SaliencyStats, Plan]) -> None:
    stats, plan = observed
    found = retained(stats, plan)
    for name, share in found.items():
        layer, kept = stats.layers[name], list(plan.layers[name].kept)
        for got, field in (
            (share.router_weight_share, layer.router_weight_sum),
            (share.selection_share, layer.count),
            (share.saliency_share, layer.weighted_norm_sum),
        ):
            assert 0 < got < 1
            whole = field[0].double()
            assert got == pytest.approx(float(whole[kept].sum() / whole.sum()), rel=1e-12)
        dead = set((layer.count[0] == 0).nonzero().flatten().tolist())
        assert dead
        assert set(share.dead_kept) | set(share.dead_removed) == dead
        assert set(share.dead_kept) <= set(kept)
        assert not set(share.dead_removed) & set(kept)
    everything = {name: LayerPlan.keeping(8, tuple(range(8))) for name in plan.layers}
    for share in retained(stats, replace(plan, layers=everything)).values():
        assert (share.router_weight_share, share.selection_share, share.saliency_share) == (1, 1, 1)


def test_plans_of_other_models_are_refused(observed: tuple[SaliencyStats, Plan]) -> None:
    stats, plan = observed
    other = {name: LayerPlan.keeping(6, (0, 1, 2)) for name in plan.layers}
    with pytest.raises(PlanError, match=r"has 6 experts in .* the original has 8"):
        retained(stats, replace(plan, layers=other))
    elsewhere = {"model.layers.7.mlp.experts": LayerPlan.keeping(8, (0, 1, 2))}
    with pytest.raises(PlanError, match="none of the 2 layers of the statistics"):
        retained(stats, replace(plan, layers=elsewhere))
    _, model = zoo.tiny("qwen3_moe")
    with pytest.raises(PlanError, match="none of the model's 2 MoE layers"):
        orphans(model, [], replace(plan, layers=elsewhere))
    with pytest.raises(PlanError, match=r"has 6 experts in .* the original has 8"):
        orphans(model, [], replace(plan, layers=other))


def test_orphans_of_a_streamed_model(tmp_path: Path) -> None:
    """A run can have the observer of routing in place of a plain one."""
    config, model = zoo.tiny("glm4_moe")
    model.save_pretrained(tmp_path)
    plan = plan_for(model)
    batches = [zoo.tiny_inputs("glm4_moe", config, seed=seed) for seed in (0, 1)]
    with open_streamed(tmp_path) as streamed:
        observer = RoutingObserver(streamed.model, plan)
        store = StateStore("device", streamed.device)
        given = BatchList.checked(batches, None)
        run_streamed(Run(observer, given, range(2), Stop()), streamed, store)
    assert observer.orphans == orphans(rd.load_model(tmp_path), batches, plan)


def test_several_plans_in_one_run() -> None:
    """As each by itself, also where the plans name different layers; the model runs once."""
    _, model = zoo.tiny("qwen3_moe")
    layers = [layer.name for layer in rd.find_moe_layers(model)]
    keep = {"one": (0, 1, 2, 3), "two": (2, 4, 5, 6, 7)}
    one = plan_keeping(dict.fromkeys(layers, keep["one"]))
    two = plan_keeping({layers[-1]: keep["two"]})
    rng = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 96, (2, 9), generator=rng)} for _ in range(2)]
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    found = orphans_of_each(model, batches, [one, two])
    assert len(runs) == 2
    assert found == [rd.orphans(model, batches, plan) for plan in (one, two)]
    assert list(found[1]) == layers[-1:]
    assert 0 < found[0][layers[0]].orphaned < found[0][layers[0]].tokens


def plan_keeping(kept: dict[str, tuple[int, ...]]) -> rd.Plan:
    layers = {name: rd.LayerPlan.keeping(8, ids) for name, ids in kept.items()}
    return rd.Plan({}, "none", "explicit", 0.5, layers, "")
