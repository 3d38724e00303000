"""What is solved: least squares of the residual stream, by gradients of the model's own code."""

import pytest
import torch
from transformers import PreTrainedModel

import reap_driver as rd
from reap_driver.model.expert_parts import down_views
from tests.driver.refitting.pairs import Pair, errors, hidden, pair

RIDGE = 30.0  # large, as the data are few and the models random
# With shared experts, with biases, with a router weight that scales the input, and with blocks that
# scale the output.
FAMILIES = {
    "qwen3_moe": {},
    "mixtral": {},
    "deepseek_v3": {},
    "gpt_oss": {},
    "llama4": {"num_experts_per_tok": 1},
    "granitemoe": {"residual_multiplier": 0.22},
    "cohere2_moe": {},
    "dbrx": {},
}
SCALES = {"granitemoe": 0.22, "cohere2_moe": 0.5, "laguna": 1.75}


def pair_of(name: str) -> Pair:
    return pair(name, **FAMILIES.get(name, {}))


def first_layer(model: PreTrainedModel) -> tuple[int, rd.MoELayer]:
    """The first MoE layer, and the index of its decoder layer."""
    layer = rd.find_moe_layers(model)[0]
    return next(int(part) for part in layer.name.split(".") if part.isdigit()), layer


def stacked(model: PreTrainedModel) -> torch.Tensor:
    """A copy of the down projections of the first MoE layer, [E, H, I]."""
    return torch.stack([view.clone() for view in down_views(first_layer(model)[1])])


def slope(full: PreTrainedModel, small: PreTrainedModel, pair: Pair) -> torch.Tensor:
    """The derivative of the squared error of the first MoE layer's output over the fitted batches
    with respect to its down projections, [E, H, I], by autograd.
    """
    index, layer = first_layer(small)
    for model in (full, small):
        model.set_experts_implementation("eager")
    module = layer.module.requires_grad_(True)
    for batch in pair.batches[:-1]:
        with torch.no_grad():
            want = hidden(full, batch)[index]
        (hidden(small, batch)[index] - want).square().sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.grad)
    return stacked(small)


@pytest.mark.parametrize("name", FAMILIES)
def test_many_steps_are_the_least_squares_of_the_residual_stream(name: str) -> None:
    given = pair_of(name)
    full, small = (model.double() for model in given.models())
    before = stacked(small)
    found = rd.refit_models(full, small, given.batches, ridge=RIDGE, steps=12)
    found.install(small)
    change = stacked(small) - before
    layer = found.layers[first_layer(small)[1].name]
    with rd.observe(given.models()[1], gram=True) as obs:
        for batch in given.batches[:-1]:
            obs(**batch)
    gram = obs.grams[first_layer(small)[1].name].gram
    mean = float(gram.diagonal(dim1=1, dim2=2).double().mean())
    # slope / 2 + lambda D is 0 at the solution; a factor c of the output counts in both.
    left = slope(full, small, given) / 2 + layer.scale**2 * RIDGE * mean * change
    size = layer.scale**2 * RIDGE * mean * change.norm()
    assert layer.kept
    assert float(change.norm()) > 0
    assert float(left.norm() / size) < 2e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_the_errors_are_those_of_the_models_on_held_out_text(name: str) -> None:
    given = pair_of(name)
    full, small = given.models()
    held = [given.batches[-1]]
    found = rd.refit_models(full, small, given.batches)
    index = first_layer(small)[0]
    before = errors(full, small, held)
    found.install(small)
    after = errors(full, small, held)
    facts = list(found.layers.values())
    assert facts[0].error_before == pytest.approx(before[index], rel=1e-4)
    left = [f.error_after if f.kept else f.error_before for f in facts]
    assert left[0] == pytest.approx(after[index], rel=1e-4)
    assert left[-1] == pytest.approx(after[-1], rel=1e-3)  # with the layers before re-fitted
    assert after[-1] < before[-1]
    assert (facts[0].fitted, facts[0].held_out) == (7 * 4 * 32, 4 * 32)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_kept_experts_are_found(name: str) -> None:
    given = pair_of(name)
    found = rd.refit_models(*given.models(), given.batches, ridge=RIDGE)
    assert {n: facts.experts for n, facts in found.layers.items()} == given.plan.kept


@pytest.mark.parametrize("name", [*SCALES, "qwen3_moe"])
def test_the_scale_of_a_layer_is_measured(name: str) -> None:
    given = pair_of(name)
    found = rd.refit_models(*given.models(), given.batches, ridge=RIDGE, steps=1)
    want = SCALES.get(name, 1.0)
    assert [facts.scale for facts in found.layers.values()] == pytest.approx([want] * 2, rel=1e-4)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_noise_in_down_projections_is_taken_away(name: str) -> None:
    given = pair_of(name)
    full, noisy = rd.load_model(given.full), rd.load_model(given.full)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in rd.find_moe_layers(noisy):
            for view in down_views(layer):
                view += 0.2 * view.std() * torch.randn(view.shape, generator=generator)
    before = errors(full, noisy, given.batches[-1:])
    found = rd.refit_models(full, noisy, given.batches, steps=6)
    found.install(noisy)
    after = errors(full, noisy, given.batches[-1:])
    assert all(facts.kept for facts in found.layers.values())
    assert after[-1] < 0.2 * before[-1]


def test_a_model_that_lacks_nothing_stays_as_it_is() -> None:
    given = pair_of("qwen3_moe")
    found = rd.refit_models(*(rd.load_model(given.full) for _ in range(2)), given.batches)
    assert found.matrices == {}
    assert all(f.error_before == 0 and not f.kept for f in found.layers.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_rounding_the_solution_changes_the_errors_little(name: str, dtype: str) -> None:
    """States go on with what is solved, not with what is left of it in the dtype of the weights."""
    given = pair_of(name)
    full, small = (rd.load_model(folder, dtype=dtype) for folder in (given.full, given.small))
    found = rd.refit_models(full, small, given.batches)
    found.install(small)
    after = errors(full, small, given.batches[-1:])
    left = [f.error_after if f.kept else f.error_before for f in found.layers.values()]
    assert {down.dtype for down in found.matrices.values()} == {getattr(torch, dtype)}
    assert left == pytest.approx(after, rel=5e-3)
