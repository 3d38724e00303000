"""Vectors of experts against the model's own experts and routers, token by token, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import reap_driver as rd
from reap_driver.merging import vectors as module
from reap_kernels.errors import DataError, UnsupportedModel, UsageError
from tests.driver import zoo
from tests.driver.observation import remote_blocks as remote

# Fused and stacked; interleaved with biases; a module per expert; a bias that corrects scores; an
# output that is not the hidden size; routers that transform what they are given.
NAMES = ["qwen3_moe", "gpt_oss", "dbrx", "deepseek_v3", "nemotron_h_latent", "gemma4", "zaya"]


def observed(
    name: str, **asked: bool
) -> tuple[PreTrainedModel, rd.VectorObserver, dict[str, Tensor]]:
    """A model, an observer that it ran in, and what the experts of each layer are given, [T, H]."""
    config, model = zoo.tiny(name)
    inputs = zoo.tiny_inputs(name, config)
    seen: dict[str, Tensor] = {}
    handles = []
    for layer in rd.find_moe_layers(model):

        def keep(_: nn.Module, given: Any, name: str = layer.name) -> None:
            seen[name] = given[0].detach().flatten(0, -2).clone()

        handles.append(layer.module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    with rd.observe_vectors(model, **asked) as obs:
        obs(**inputs)
    return model, obs, seen


def by_hand(layer: rd.MoELayer, hidden: Tensor) -> Tensor:
    """Sums of the outputs of each expert by the module's own forward, one expert at a time."""
    sums = []
    for expert in range(layer.num_experts):
        ids = torch.full((len(hidden), 1), expert)
        with torch.no_grad():
            sums.append(layer.module(hidden, ids, torch.ones(len(hidden), 1).to(hidden)))
    return torch.stack(sums).double().sum(dim=1)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "dbrx"])
def test_outputs_are_those_of_every_expert_for_every_token(name: str) -> None:
    model, obs, seen = observed(name, logits=False)
    layers = rd.find_moe_layers(model)
    assert list(obs.vectors) == [layer.name for layer in layers]
    for layer in layers:
        found, hidden = obs.vectors[layer.name], seen[layer.name]
        assert found.logit_products is None
        assert found.tokens == len(hidden)
        assert torch.equal(found.count, obs.stats.layers[layer.name].count[0])
        torch.testing.assert_close(found.output_sum, by_hand(layer, hidden), rtol=1e-4, atol=1e-4)
        assert found.mean_outputs is not None
        torch.testing.assert_close(found.mean_outputs * found.tokens, found.output_sum)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral"])
def test_logits_are_those_of_the_routers(name: str) -> None:
    model, obs, seen = observed(name, outputs=False)
    state = model.state_dict()
    for layer, found in obs.vectors.items():
        block = layer.removesuffix("experts")
        [weight] = [n for n in state if n in (f"{block}gate.weight", f"{block}router.weight")]
        logits = seen[layer].double() @ state[weight].double().mT
        if f"{block}router.bias" in state:
            logits += state[f"{block}router.bias"].double()
        assert found.output_sum is None
        torch.testing.assert_close(found.logit_products, logits.mT @ logits, rtol=1e-4, atol=1e-4)
        cosines = torch.nn.functional.cosine_similarity(logits.mT[:, None], logits.mT, dim=2)
        torch.testing.assert_close(found.logit_similarity, cosines, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("elements", [5 * 32, 3 * 8 * 32])  # few tokens, or few experts, at a time
@pytest.mark.parametrize("name", NAMES)
def test_text_in_parts_is_the_same_as_at_once(name: str, elements: int, monkeypatch) -> None:
    config, model = zoo.tiny(name)
    ids = zoo.tiny_inputs(name, config)["input_ids"]
    with rd.observe_vectors(model) as whole:
        whole(input_ids=ids)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
    with rd.observe_vectors(model) as parts:
        for row in ids:
            parts(input_ids=row[None])
    for layer, vectors in whole.vectors.items():
        other = parts.vectors[layer]
        assert other.tokens == vectors.tokens
        assert torch.equal(other.count, vectors.count)
        for one, two in (
            (vectors.output_sum, other.output_sum),
            (vectors.logit_products, other.logit_products),
        ):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_tokens_that_do_not_count_are_left_out() -> None:
    config, model = zoo.tiny("qwen3_moe")
    ids = zoo.tiny_inputs("qwen3_moe", config)["input_ids"]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, :5] = True
    with rd.observe_vectors(model) as short:
        short(input_ids=ids[:, :5])
    with rd.observe_vectors(model) as masked:
        masked(input_ids=ids, token_mask=mask)
    for layer, vectors in short.vectors.items():
        other = masked.vectors[layer]
        assert other.tokens == vectors.tokens == 5 * len(ids)
        torch.testing.assert_close(vectors.output_sum, other.output_sum, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            vectors.logit_products, other.logit_products, rtol=1e-4, atol=1e-4
        )


def test_a_forward_that_fails_leaves_nothing() -> None:
    config, model = zoo.tiny("qwen3_moe")
    inputs = zoo.tiny_inputs("qwen3_moe", config)
    with rd.observe_vectors(model) as obs:
        obs(**inputs)
        before = obs.vectors

        def fail(*_: object) -> None:
            raise RuntimeError("a layer fails")

        handle = rd.find_moe_layers(model)[1].module.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="a layer fails"):
            obs(**inputs)
        handle.remove()
        for layer, vectors in before.items():
            assert torch.equal(obs.vectors[layer].output_sum, vectors.output_sum)
            assert torch.equal(obs.vectors[layer].logit_products, vectors.logit_products)
        obs(**inputs)
        for layer, vectors in before.items():
            assert obs.vectors[layer].tokens == 2 * vectors.tokens
            torch.testing.assert_close(obs.vectors[layer].output_sum, 2 * vectors.output_sum)
            torch.testing.assert_close(
                obs.vectors[layer].logit_products, 2 * vectors.logit_products
            )


def test_statistics_and_outputs_are_those_of_observe() -> None:
    config, model = zoo.tiny("qwen3_moe")
    inputs = zoo.tiny_inputs("qwen3_moe", config)
    with rd.observe(model) as plain:
        logits = plain(**inputs).logits
    with rd.observe_vectors(model) as obs:
        assert torch.equal(obs(**inputs).logits, logits)
    for layer, stats in plain.stats.layers.items():
        for one, two in zip(stats.packed(), obs.stats.layers[layer].packed(), strict=True):
            assert torch.equal(one, two)
    once = obs.vectors
    with torch.no_grad():
        model(**inputs)  # outside, where nothing is seen
    assert all(torch.equal(v.output_sum, once[n].output_sum) for n, v in obs.vectors.items())
    with obs:
        obs(**inputs)
    for layer, vectors in obs.vectors.items():
        assert vectors.tokens == 2 * inputs["input_ids"].numel()
        torch.testing.assert_close(vectors.logit_products, 2 * once[layer].logit_products)


def test_nothing_is_summed_unless_asked_for() -> None:
    _, model = zoo.tiny("qwen3_moe")
    assert not hasattr(rd.observe(model), "vectors")
    with pytest.raises(UsageError, match="neither outputs nor logits"):
        rd.observe_vectors(model, outputs=False, logits=False)


def test_experts_with_inputs_of_their_own_have_logits_alone() -> None:
    config, model = zoo.tiny("llama4")
    inputs = zoo.tiny_inputs("llama4", config)
    with rd.observe_vectors(model) as obs, pytest.raises(UnsupportedModel, match="outputs=False"):
        obs(**inputs)
    with rd.observe_vectors(model, outputs=False) as obs:
        obs(**inputs)
    assert all(vectors.logit_similarity is not None for vectors in obs.vectors.values())


def test_experts_that_are_not_seen_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="computes its experts inside its block"):
        rd.observe_vectors(remote.remote("inline").eval())


@pytest.mark.parametrize("expert", [5, 3])  # 20 tokens are routed to the one, none to the other
def test_outputs_that_are_not_finite_are_refused(expert: int) -> None:
    config, model = zoo.tiny("qwen3_moe")
    layer = rd.find_moe_layers(model)[1].module
    with torch.no_grad():
        layer.down_proj[expert] = float("nan")

    def merge() -> None:
        with rd.observe_vectors(model) as obs:
            obs(**zoo.tiny_inputs("qwen3_moe", config))
        with rd.merged_experts(model, obs.vectors):
            raise AssertionError

    with pytest.raises(DataError, match=r"layers.1.mlp.experts.* NaN or Inf"):
        merge()


def test_an_expert_without_logits_is_like_no_other() -> None:
    products = torch.tensor([[4.0, 0.0, 2.0], [0.0, 0.0, 0.0], [2.0, 0.0, 1.0]]).double()
    found = rd.LayerVectors(1, torch.ones(3).long(), logit_products=products)
    assert found.logit_similarity is not None
    assert found.logit_similarity.tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 1]]
