"""Models and inputs that cannot be re-fitted, each with its reason."""

import pytest
import torch

import reap_driver as rd
from reap_driver.model.expert_parts import down_views
from reap_kernels.errors import CheckpointError, DataError, PlanError, UnsupportedModel, UsageError
from tests.driver import zoo
from tests.driver.refitting.pairs import pair


@pytest.mark.parametrize("name", ["gemma4", "afmoe", "flex_olmo"])
def test_a_norm_after_the_experts_is_refused(name: str) -> None:
    given = pair(name)
    with pytest.raises(UnsupportedModel, match=r"layers\.\d does more .* norm after them"):
        rd.refit_models(*given.models(), given.batches)


@pytest.mark.parametrize(
    ("name", "config", "why"),
    [
        ("nemotron_h_latent", {}, "vectors of 16 numbers, narrower than the residual stream"),
        ("deepseek_v4", {}, "not one residual stream"),
        ("qwen4_exp", {}, r"given \[128, 32\] \(tokens, width\), its decoder layer"),
        ("llama4", {"num_experts_per_tok": 2}, "inputs that differ"),
    ],
)
def test_other_outputs_are_refused(name: str, config: dict[str, int], why: str) -> None:
    given = pair(name, **config)
    with pytest.raises(UnsupportedModel, match=why):
        rd.refit_models(*given.models(), given.batches)


def test_a_model_of_another_original_is_refused() -> None:
    given = pair("qwen3_moe")
    _, small = given.models()
    other = zoo.tiny("qwen3_moe", seed=1)[1]
    why = r"not a cut of Qwen3MoeForCausalLM: row 0 of its model\.layers\.0\.mlp\.gate\.weight"
    with pytest.raises(CheckpointError, match=why):
        rd.refit_models(other, small, given.batches)


def test_one_row_of_a_router_is_enough_to_refuse() -> None:
    full, small = pair("qwen3_moe").models()
    with torch.no_grad():
        small.model.layers[1].mlp.gate.weight[3, 0] += 1e-3
    why = r"not a cut of .*/full: row 3 of its model\.layers\.1\.mlp\.gate\.weight is no row there"
    with pytest.raises(CheckpointError, match=why):
        rd.refit_models(full, small, pair("qwen3_moe").batches)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"num_hidden_layers": 3}, "it has 2 decoder layers, there are 3"),
        ({"num_hidden_layers": 1}, "only the one has experts in model.layers.1.mlp.experts"),
        ({"hidden_size": 40}, "has a hidden_size of 32, there it is 40"),
        ({"num_experts": 4}, "has a num_experts of 6, there it is 4"),
    ],
)
def test_models_of_other_sizes_are_refused(config: dict[str, int], why: str) -> None:
    given = pair("qwen3_moe")
    models = [zoo.tiny("qwen3_moe", **config)[1], given.models()[1]]
    with pytest.raises(CheckpointError, match=why):
        rd.refit_models(*models, given.batches)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("where", ["experts", "attention"])
def test_nan_is_refused(which: int, where: str) -> None:
    given = pair("qwen3_moe")
    models = given.models()
    with torch.no_grad():
        layer = models[which].model.layers[1]
        part = layer.mlp.experts.down_proj if where == "experts" else layer.self_attn.o_proj.weight
        part[0] = torch.nan
    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.experts"):
        rd.refit_models(*models, given.batches)


def test_held_out_batches_are_checked() -> None:
    given = pair("qwen3_moe")
    models = given.models()
    with pytest.raises(DataError, match="held_out has 2 values for 8 batches"):
        rd.refit_models(*models, given.batches, held_out=[True, False])
    with pytest.raises(DataError, match="no token is fitted"):
        rd.refit_models(*models, given.batches[:1])
    with pytest.raises(DataError, match="no token is held out to choose the ridge"):
        rd.refit_models(*models, given.batches, held_out=[False] * 8)
    with pytest.raises(UsageError, match="ridge is -1"):
        rd.refit_models(*models, given.batches, ridge=-1.0)
    fixed = rd.refit_models(*models, given.batches, held_out=[False] * 8, ridge=1.0)
    assert all(facts.held_out == 0 for facts in fixed.layers.values())


def test_matrices_of_another_model_are_not_installed() -> None:
    given = pair("qwen3_moe")
    full, small = given.models()
    found = rd.refit_models(full, small, given.batches)
    layers = rd.find_moe_layers(full)
    before = [view.clone() for layer in layers for view in down_views(layer)]
    with pytest.raises(PlanError, match=r"are \[6, 32, 24\], this model has \[8, 32, 24\]"):
        found.install(full)
    after = [view for layer in layers for view in down_views(layer)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
