"""A plan put into a model in memory: what it computes, that it is gone afterwards, and refusals."""

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import reap_driver as rd
from reap_driver.compat.text_model import text_model
from reap_driver.evaluation.compensation import PlannedModel, _Experts
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.files.matrices import Matrices
from reap_kernels.errors import PlanError, UnsupportedModel
from tests.driver import zoo
from tests.driver.observation import remote_blocks as remote

NAME = "qwen3_moe"


def narrow(layer: rd.MoELayer, seed: int = 0, *, rest: bool = False) -> rd.LayerPlan:
    """Every second expert, with half of the neurons, other ones of each; or with the rest."""
    rng = torch.Generator().manual_seed(seed)
    kept = tuple(range(0, layer.num_experts, 2))
    if layer.n_group > 1:  # all but the first of each group
        size = layer.num_experts // layer.n_group
        kept = tuple(e for e in range(layer.num_experts) if e % size)
    half = layer.intermediate_size // 2
    orders = [torch.randperm(layer.intermediate_size, generator=rng).tolist() for _ in kept]
    chosen = [order[half:] if rest else order[:half] for order in orders]
    neurons = tuple(tuple(sorted(ids)) for ids in chosen)
    return rd.LayerPlan.keeping(layer.num_experts, kept, layer.intermediate_size, neurons)


def plan_of(layers: Mapping[str, rd.LayerPlan]) -> rd.Plan:
    return rd.Plan({"id": "m"}, "obs", "uniform", 0.75, dict(layers), "")


def first_output(model: PreTrainedModel, name: str, inputs: dict[str, Tensor]) -> Tensor:
    """What the experts of a layer return in a forward pass."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        found.append(output.detach().clone())

    handle = model.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        text_model(model)(**inputs)
    handle.remove()
    return found[0]


def same_weights(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        pair = (side.contiguous().view(-1).view(torch.uint8) for side in (tensor, before[name]))
        assert torch.equal(*pair), name


def down_of(layer: rd.MoELayer, plan: rd.LayerPlan) -> Tensor:
    """The kept columns of the down projections of the kept experts, unchanged: [E', H, I']."""
    module = layer.module
    if isinstance(module, nn.ModuleList):
        whole = torch.stack([expert.get_submodule("down_proj").weight for expert in module])
    elif hasattr(module, "mlp"):  # dbrx
        whole = module.mlp.w2.view(layer.num_experts, layer.intermediate_size, -1).mT
    else:
        whole = module.down_proj[: layer.num_experts]
        if getattr(module, "is_transposed", False) or "Llama4" in type(module).__name__:
            whole = whole.mT
    assert plan.neurons is not None
    each = zip(plan.kept, plan.neurons, strict=True)
    return torch.stack([whole[e][:, list(ids)] for e, ids in each]).detach().clone()


@pytest.mark.parametrize("name", zoo.names())
def test_neurons_that_go_and_those_that_stay_add_up(name: str) -> None:
    """In every layout: outputs with some neurons and with the others, less that with none (which is
    the bias), are those with all."""
    config, model = zoo.tiny(name)
    inputs = zoo.tiny_inputs(name, config)
    layer = rd.find_moe_layers(model)[0]
    some, others = narrow(layer), narrow(layer, rest=True)
    with rd.masked_experts(model, {layer.name: some.kept}):
        whole = first_output(model, layer.name, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parts = []
    for plan, factor in ((some, 1), (others, 1), (some, 0)):
        down = {layer.name: factor * down_of(layer, plan)}
        with rd.compensated(model, plan_of({layer.name: plan}), down):
            parts.append(first_output(model, layer.name, inputs))
        same_weights(model, before)
    assert not torch.allclose(parts[0], parts[1])
    torch.testing.assert_close(parts[0] + parts[1] - parts[2], whole, rtol=1e-4, atol=1e-5)


def test_it_is_the_narrow_model() -> None:
    """Also with other matrices: a model of the smaller sizes, filled by hand, computes the same."""
    config, model = zoo.tiny(NAME)
    layers = {layer.name: layer for layer in rd.find_moe_layers(model)}
    plans = {name: narrow(layer, seed) for seed, (name, layer) in enumerate(layers.items())}
    rng = torch.Generator().manual_seed(5)
    down = {name: down_of(layer, plans[name]) for name, layer in layers.items()}
    down = {n: d + 0.05 * torch.randn(d.shape, generator=rng) for n, d in down.items()}
    [size] = {plan.narrow_width for plan in plans.values()}
    _, small = zoo.tiny(NAME, num_experts=4, moe_intermediate_size=size)
    weights = copy.deepcopy(model.state_dict())
    for name, plan in plans.items():
        router, kept = name.replace("experts", "gate.weight"), list(plan.kept)
        weights[router] = weights[router][kept]
        fused = weights[f"{name}.gate_up_proj"]
        assert plan.neurons is not None
        rows = [[*ids, *(n + layers[name].intermediate_size for n in ids)] for ids in plan.neurons]
        each = zip(kept, rows, strict=True)
        weights[f"{name}.gate_up_proj"] = torch.stack([fused[e][r] for e, r in each])
        weights[f"{name}.down_proj"] = down[name]
    small.load_state_dict(weights)
    inputs = zoo.tiny_inputs(NAME, config)
    with torch.no_grad(), rd.compensated(model, plan_of(plans), down):
        found = model(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(found, small(**inputs).logits, rtol=2e-5, atol=2e-5)


def test_lists_of_experts() -> None:
    model = remote.remote("method").eval()
    layer = rd.find_moe_layers(model)[0]
    plan = narrow(layer)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    down = down_of(layer, plan)
    with _Experts(layer, plan, 2 * down).replaced():
        changed = model.get_submodule(layer.name)
        assert plan.neurons is not None
        for rank, expert in enumerate(plan.kept):
            weight = changed[expert].get_submodule("down_proj").weight
            assert torch.equal(weight[:, list(plan.neurons[rank])], 2 * down[rank])
            assert int((weight != 0).any(0).sum()) == plan.narrow_width
    same_weights(model, before)


def test_whole_experts_with_other_matrices() -> None:
    """What a re-fit makes: no neuron goes, and the experts that stay get new matrices."""
    config, model = zoo.tiny(NAME)
    inputs = zoo.tiny_inputs(NAME, config)
    layer = rd.find_moe_layers(model)[0]
    whole = rd.LayerPlan.keeping(8, (0, 2, 4, 6))
    plan = plan_of({layer.name: whole})
    own = layer.module.get_parameter("down_proj").detach()[[0, 2, 4, 6]].clone()
    with rd.masked_experts(model, plan.kept):
        masked = first_output(model, layer.name, inputs)
    with rd.compensated(model, plan, {layer.name: own}):
        assert torch.equal(first_output(model, layer.name, inputs), masked)
    with rd.compensated(model, plan):
        assert torch.equal(first_output(model, layer.name, inputs), masked)
    with rd.compensated(model, plan, {layer.name: 3 * own}):
        torch.testing.assert_close(first_output(model, layer.name, inputs), 3 * masked)


def test_contexts_nest_and_end_with_exceptions() -> None:
    config, model = zoo.tiny(NAME)
    inputs = zoo.tiny_inputs(NAME, config)
    layer = rd.find_moe_layers(model)[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = narrow(layer)
    down = {layer.name: down_of(layer, plan)}
    ready = PlannedModel(RouterMasks(model), plan_of({layer.name: plan}), down)
    with ready.active():
        outer = first_output(model, layer.name, inputs)
        with rd.compensated(model, plan_of({layer.name: plan}), {layer.name: 0 * down[layer.name]}):
            assert not first_output(model, layer.name, inputs).any()
        assert torch.equal(first_output(model, layer.name, inputs), outer)
    same_weights(model, before)
    with pytest.raises(KeyboardInterrupt), ready.active():
        raise KeyboardInterrupt
    same_weights(model, before)
    with ready.active():
        assert torch.equal(first_output(model, layer.name, inputs), outer)


def test_a_folder_of_matrices(tmp_path: Path) -> None:
    config, model = zoo.tiny(NAME)
    inputs = zoo.tiny_inputs(NAME, config)
    layer = rd.find_moe_layers(model)[0]
    plan = narrow(layer)
    down = down_of(layer, plan)
    folder = Matrices.create(tmp_path / "plan.matrices", model={"id": "m"})
    folder.put(layer.name, down)
    digest = {"digest": folder.digest}
    full = rd.Plan({}, "obs", "uniform", 0.75, {layer.name: plan}, "", matrices=digest)
    with rd.compensated(model, full, {layer.name: down}):
        expected = first_output(model, layer.name, inputs)
    with rd.compensated(model, full, tmp_path / "plan.matrices"):
        assert torch.equal(first_output(model, layer.name, inputs), expected)
    folder.put(layer.name, 2 * down)
    with (
        pytest.raises(PlanError, match=r"has the digest sha256:.*, but the plan goes with"),
        rd.compensated(model, full, tmp_path / "plan.matrices"),
    ):
        raise AssertionError


def refused(model: PreTrainedModel, plan: rd.Plan, matrices: object, says: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PlanError, match=says), rd.compensated(model, plan, matrices):
        raise AssertionError
    same_weights(model, before)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    _, model = zoo.tiny(NAME)
    layer = rd.find_moe_layers(model)[0]
    plan, name = narrow(layer), layer.name
    down, made = down_of(layer, plan), plan_of({layer.name: plan})
    refused(model, made, None, "so it is used with its matrices; keep their folder")
    refused(model, made, {}, f"have none of layer '{name}', which the plan cuts to 12 neurons")
    refused(model, made, {name: down[1:]}, r"\[3, 32, 12\], but the plan keeps 4 experts of 12")
    refused(model, made, {name: down[:, :, 1:]}, r"\[4, 32, 11\], but the plan keeps")
    refused(model, made, {name: down[:, 1:]}, r"in this model they are \[4, 32, 12\]")
    refused(model, made, tmp_path / "none", "No such file")
    ids = tuple(range(12))
    wider = plan_of({name: rd.LayerPlan.keeping(8, plan.kept, 30, (ids,) * 4)})
    refused(model, wider, {name: down}, "experts of 30 neurons in .*, the model's have 24")
    other = plan_of({"model.other": plan})
    refused(model, other, {"model.other": down}, "'model.other' is none of the model's 2 MoE")


def test_experts_that_are_not_in_memory_are_refused() -> None:
    _, model = zoo.tiny(NAME)
    layer = rd.find_moe_layers(model)[0]
    plan = narrow(layer)
    down = {layer.name: down_of(layer, plan)}
    layer.module.to("meta")
    with (
        pytest.raises(UnsupportedModel, match=r"is offloaded .* so its experts' weights cannot be"),
        rd.compensated(model, plan_of({layer.name: plan}), down),
    ):
        raise AssertionError


def test_blocks_that_run_their_experts_inline_are_refused() -> None:
    model = remote.remote("inline").eval()
    layer = rd.find_moe_layers(model)[0]
    plan = narrow(layer)
    down = torch.zeros(len(plan.kept), layer.hidden_size, plan.narrow_width or 0)
    with pytest.raises(UnsupportedModel, match="which of their matrices is the down projection"):
        _Experts(layer, plan, down)
