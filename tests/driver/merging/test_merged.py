"""Merged experts: aligned neurons, weighted means, and what a model with them computes."""

import contextlib
import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import reap_driver as rd
from reap_driver.merging.averaging import assignment, merged_parts, neurons_of, reordered
from reap_driver.model.expert_parts import DOWN, neuron_rows, part_views
from reap_kernels.errors import PlanError, UnsupportedModel
from tests.driver import zoo

# Fused; interleaved with biases; without a gate; transposed; all experts in one matrix; latent.
LAYOUTS = ["qwen3_moe", "gpt_oss", "nemotron_h", "llama4", "dbrx", "nemotron_h_latent", "mixtral"]


def layer_of(name: str) -> rd.MoELayer:
    _, model = zoo.tiny(name)
    return rd.find_moe_layers(model)[0]


@pytest.mark.parametrize("seed", range(4))
def test_the_assignment_has_the_least_sum_of_squared_distances(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    target, neurons = torch.randn(2, 5, 7, generator=rng).double()
    best = min(
        itertools.permutations(range(5)),
        key=lambda order: float((target - neurons[list(order)]).square().sum()),
    )
    assert assignment(target, neurons).tolist() == list(best)
    order = torch.randperm(5, generator=rng)
    assert torch.equal(target[order][assignment(target, target[order])], target)


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_expert_computes_the_same_with_its_neurons_in_another_order(name: str) -> None:
    layer = layer_of(name)
    weights, views = part_views(layer)
    rows = {p: neuron_rows(weights, p) for p in views if p not in (DOWN, "down_bias")}
    expert = {part: each[0].detach().double() for part, each in views.items()}
    order = torch.randperm(layer.intermediate_size, generator=torch.Generator().manual_seed(0))
    other = reordered(expert, rows, order)
    assert torch.equal(neurons_of(other, rows), neurons_of(expert, rows)[order])
    width = neurons_of(expert, rows).shape
    held = sum(t.numel() for part, t in expert.items() if part != "down_bias")
    assert width[0] * width[1] == held  # every number belongs to one neuron
    x = torch.randn(5, layer.hidden_size, generator=torch.Generator().manual_seed(1)).double()
    activation = nn.functional.silu
    up = x @ expert["up"].mT + expert.get("up_bias", torch.zeros(1))
    moved = x @ other["up"].mT + other.get("up_bias", torch.zeros(1))
    first, second = (
        activation(one[:, index[:, 0]]) * one[:, index[:, -1]]
        for one, index in ((up, rows["up"]), (moved, rows["up"]))
    )
    assert not torch.allclose(first, second)
    torch.testing.assert_close(first @ expert[DOWN].mT, second @ other[DOWN].mT)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("aligned", [False, True])
def test_parts_are_means_weighted_by_tokens(name: str, aligned: bool) -> None:
    layer = layer_of(name)
    weights, views = part_views(layer)
    count = torch.tensor([2, 0, 5, 0, 1, 3, 0, 7])
    rows = {p: neuron_rows(weights, p) for p in views if p not in (DOWN, "down_bias")}
    for group, shares in (((7, 2, 4), (7, 5, 1)), ((1, 3), (1, 1)), ((5, 6), (1, 0))):
        found = merged_parts(weights, views, group, count, aligned=aligned)
        experts = [{p: each[e].detach().double() for p, each in views.items()} for e in group]
        if aligned:
            target = neurons_of(experts[0], rows)
            orders = [assignment(target, neurons_of(expert, rows)) for expert in experts]
            assert orders[0].tolist() == list(range(layer.intermediate_size))
            experts = [reordered(e, rows, o) for e, o in zip(experts, orders, strict=True)]
        assert found.keys() == views.keys()
        for part, tensor in found.items():
            pairs = zip(shares, experts, strict=True)
            mean = sum(share * expert[part] for share, expert in pairs) / sum(shares)
            torch.testing.assert_close(tensor, mean)


def test_copies_of_an_expert_in_other_orders_merge_into_it() -> None:
    """And without alignment they do not."""
    layer = layer_of("qwen3_moe")
    weights, views = part_views(layer)
    rows = {"up": neuron_rows(weights, "up")}
    first = {part: each[0].detach().double() for part, each in views.items()}
    for expert in (1, 2):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(expert))
        for part, tensor in reordered(first, rows, order).items():
            with torch.no_grad():
                views[part][expert].copy_(tensor)
    count = torch.tensor([3, 2, 1, 0, 0, 0, 0, 0])
    for aligned in (True, False):
        found = merged_parts(weights, views, (0, 1, 2), count, aligned=aligned)
        close = [torch.allclose(found[part], tensor) for part, tensor in first.items()]
        assert all(close) == aligned


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["hc-smoe", "m-smoe"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "dbrx", "deepseek_v3"])
def test_a_model_is_merged_inside_the_context_alone(name: str, method: str) -> None:
    config, model = zoo.tiny(name)
    inputs = zoo.tiny_inputs(name, config)
    with rd.observe_vectors(model) as obs:
        obs(**inputs)
    before = state_of(model)
    with torch.no_grad():
        full = model(**inputs).logits
        with rd.merged_experts(model, obs.vectors, method, 0.5) as groups:
            merged = model(**inputs).logits
            inside = state_of(model)
            for layer in rd.find_moe_layers(model):
                _, views = part_views(layer)
                assert sorted(e for group in groups[layer.name] for e in group) == list(range(8))
                for group in groups[layer.name]:
                    for each in views.values():
                        assert all(torch.equal(each[e], each[group[0]]) for e in group)
        assert sum(map(len, groups.values())) == 8  # two layers of 8 experts
        changed = {n for n, tensor in inside.items() if not torch.equal(tensor, before[n])}
        assert changed
        assert all("experts" in name for name in changed)  # the routers stay
        assert torch.isfinite(merged).all()
        assert not torch.allclose(merged, full)
        assert same(model, before)
        assert torch.equal(model(**inputs).logits, full)


def test_the_values_are_the_weighted_means_of_a_plain_model() -> None:
    config, model = zoo.tiny("qwen3_moe")
    with rd.observe_vectors(model, logits=False) as obs:
        obs(**zoo.tiny_inputs("qwen3_moe", config))
    layer = rd.find_moe_layers(model)[0]
    up, down = (t.detach().clone() for t in (layer.module.gate_up_proj, layer.module.down_proj))
    count = obs.vectors[layer.name].count.double()
    with rd.merged_experts(model, obs.vectors, "hc-smoe", 0.5) as groups:
        for group in groups[layer.name]:
            ids = list(group)
            share = (count[ids] / count[ids].sum())[:, None, None]
            for now, was in ((layer.module.gate_up_proj, up), (layer.module.down_proj, down)):
                want = (share * was[ids].double()).sum(dim=0).to(was.dtype)
                for expert in ids:
                    torch.testing.assert_close(now[expert].detach(), want)


def test_an_exception_restores_the_model() -> None:
    config, model = zoo.tiny("qwen3_moe")
    with rd.observe_vectors(model) as obs:
        obs(**zoo.tiny_inputs("qwen3_moe", config))
    before = state_of(model)
    changed = []
    with contextlib.suppress(KeyboardInterrupt), rd.merged_experts(model, obs.vectors):
        changed.append(not same(model, before))
        raise KeyboardInterrupt
    assert changed == [True]
    assert same(model, before)


def test_layers_without_vectors_stay() -> None:
    config, model = zoo.tiny("qwen3_moe")
    with rd.observe_vectors(model) as obs:
        obs(**zoo.tiny_inputs("qwen3_moe", config))
    name = rd.find_moe_layers(model)[1].name
    before = state_of(model)
    with rd.merged_experts(model, {name: obs.vectors[name]}) as groups:
        inside = state_of(model)
    changed = {n for n, tensor in inside.items() if not torch.equal(tensor, before[n])}
    assert list(groups) == [name]
    assert {n.rpartition(".")[0] for n in changed} == {name}


def test_vectors_of_another_model_are_refused() -> None:
    _, model = zoo.tiny("qwen3_moe")
    name = rd.find_moe_layers(model)[0].name
    sums = torch.ones(4, 2).double()
    for layer, words in ((name, "has 4 experts there and 8 in the model"), ("a", "and no in the")):
        vectors = {layer: rd.LayerVectors(4, torch.ones(4).long(), sums)}
        with pytest.raises(PlanError, match=words), rd.merged_experts(model, vectors):
            raise AssertionError


def test_experts_that_are_not_in_memory_are_refused() -> None:
    _, model = zoo.tiny("qwen3_moe")
    layer = rd.find_moe_layers(model)[0]
    layer.module.to("meta")
    sums = torch.randn(8, 2).double()
    vectors = {layer.name: rd.LayerVectors(4, torch.ones(8).long(), sums)}
    with pytest.raises(UnsupportedModel, match="is offloaded"), rd.merged_experts(model, vectors):
        raise AssertionError
