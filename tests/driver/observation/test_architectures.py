"""Every architecture: statistics against a float64 oracle, outputs against a float64 model."""

import datetime
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from reap_driver.compat.model_config import config_digest, identifying_fields
from reap_driver.compat.text_model import text_model
from reap_driver.observation.observer import observe
from reap_kernels import SaliencyStats
from reap_kernels.errors import UnsupportedModel
from tests.driver import zoo
from tests.driver.observation import oracle, runs

NAMES = zoo.names()

# Layers a text batch does not reach, by architecture.
_UNREACHED = {"ernie4_5_vl_moe": 2, "qwen3_omni_moe_whole": 2}

every_architecture = pytest.mark.parametrize("name", NAMES)
Support = Callable[[str, str, str], None]


@every_architecture
def test_statistics_equal_the_oracle(name: str, support: Support, tmp_path: Path) -> None:
    """For the layers' own inputs and routing: counts exact, sums within 1e-6 relative.

    The statistics can also be saved and read, so the reader accepts their values.
    """
    run = runs.run(name)
    run.stats.save(tmp_path / "stats")
    assert list(SaliencyStats.load(tmp_path / "stats").layers) == list(run.stats.layers)
    for layer, stats in run.stats.layers.items():
        module = run.model.get_submodule(layer)
        truth = oracle.expected(module, run.calls[layer], stats.num_experts)
        oracle.assert_matches(stats, truth, 1e-6)
    support(name, "statistics", "pass")


@every_architecture
def test_statistics_from_token_ids(name: str, support: Support) -> None:
    """End to end: the statistics of the plain forward within 1e-6, and the same experts kept."""
    run = runs.run(name)
    for layer, stats in run.stats.layers.items():
        module = run.model.get_submodule(layer)
        truth = oracle.expected(module, run.plain_calls[layer], stats.num_experts)
        oracle.assert_matches(stats, truth, 1e-6)
        ours = runs.mean_saliency(stats.weighted_norm_sum[0], stats.count[0])
        theirs = runs.mean_saliency(truth["weighted_norm_sum"], truth["count"])
        assert runs.kept_half(ours) == runs.kept_half(theirs)
    support(name, "end to end", "pass")


@every_architecture
def test_output_is_as_close_to_float64_as_eager(name: str, support: Support) -> None:
    """The distance to a float64 copy is at most twice that of the eager model."""
    run = runs.run(name)
    scale = run.double.norm()
    eager = float((run.plain - run.double).norm() / scale)
    ours = float((run.observed - run.double).norm() / scale)
    assert ours <= 2 * eager + 1e-7
    support(name, "output", "pass")


@every_architecture
def test_one_call_a_layer(name: str) -> None:
    """Each MoE layer runs once per forward and counts every token once."""
    run = runs.run(name)
    calls = [len(run.calls[layer].inputs) for layer in run.names]
    assert calls == [int(layer in run.stats.layers) for layer in run.names]
    assert len(run.names) - len(run.stats.layers) == _UNREACHED.get(name, 0)
    tokens = run.inputs["input_ids"].numel()
    assert all(int(layer.tokens.sum()) == tokens for layer in run.stats.layers.values())


@every_architecture
def test_reference_backend_counts_the_same(name: str) -> None:
    """The reference backend on the same batch: counts equal, sums of two fp32 forwards close."""
    run = runs.run(name)
    with observe(run.model, backend="reference") as obs, torch.no_grad():
        text_model(run.model)(**run.inputs, use_cache=False)
    for layer, stats in obs.stats.layers.items():
        other = run.stats.layers[layer]
        assert torch.equal(stats.counts, other.counts)
        assert torch.equal(stats.tokens, other.tokens)
        torch.testing.assert_close(stats.sums, other.sums, rtol=5e-6, atol=0)


@functools.cache
def _facts(name: str) -> dict[str, object]:
    layers = runs.run(name).stats.provenance["layers"]
    return next(iter(layers.values()))


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("qwen3_moe", {"num_experts": 8, "top_k": 3, "n_group": 1, "scale": 1.0}),
        ("qwen3_moe", {"hidden_size": 32, "intermediate_size": 24, "norm_space": "output"}),
        ("deepseek_v3", {"top_k": 3, "n_group": 2, "topk_group": 1, "scale": 1.0}),
        ("gemma4", {"num_experts": 8, "top_k": 3, "n_group": 1}),
        ("gpt_oss", {"hidden_size": 32, "intermediate_size": 24, "top_k": 3}),
        ("laguna", {"scale": 1.75}),
        ("minimax_m3_vl", {"scale": 1.75}),
        ("step3p7", {"scale": 1.75, "num_experts": 8}),
        ("openai_privacy_filter", {"scale": 3.0}),
        ("cohere2_moe", {"scale": 0.5}),
        ("nemotron_h_latent", {"norm_space": "latent", "hidden_size": 16, "n_group": 2}),
        ("longcat_flash", {"num_experts": 8, "top_k": 4}),
        ("zaya", {"num_experts": 8, "top_k": 1}),
        ("dbrx", {"num_experts": 8, "top_k": 3, "hidden_size": 32, "intermediate_size": 24}),
        ("llama4", {"num_experts": 8, "top_k": 2, "hidden_size": 32, "intermediate_size": 24}),
    ],
)
def test_layer_facts(name: str, facts: dict[str, object]) -> None:
    """The provenance of a layer agrees with its configuration."""
    assert {key: _facts(name)[key] for key in facts} == facts


@pytest.mark.parametrize("name", zoo.refused_names())
def test_refused_on_this_version(name: str, support: Support) -> None:
    """Architectures this transformers version keeps off the interface are refused by name."""
    with pytest.raises(UnsupportedModel, match="AriaExperts"):
        observe(zoo.tiny(name)[1])
    support(name, "statistics", "refused")


def test_text_leaves_vision_experts_out() -> None:
    """ERNIE-VL: experts that no token reached have no statistics and are listed as unobserved."""
    stats = runs.run("ernie4_5_vl_moe").stats
    assert all("text_moe" in layer for layer in stats.layers)
    assert [name.split(".")[-2] for name in stats.provenance["unobserved"]] == ["vision_moe"] * 2


def test_provenance() -> None:
    """Provenance has what plans and merges need: the model, its layers, software and backend."""
    run = runs.run("qwen3_moe")
    record = run.stats.provenance
    assert record["model"] == {
        "id": "",
        "config_digest": config_digest(run.model.config),
        "model_type": "qwen3_moe",
        "architecture": "Qwen3MoeForCausalLM",
        "config": identifying_fields(run.model.config),
        "parameters": run.model.num_parameters(),
        "dtype": "float32",
    }
    [one, _] = record["layers"].values()
    experts = [p for n, p in run.model.named_parameters() if ".0.mlp.experts." in n]
    assert one["expert_parameters"] * one["num_experts"] == sum(p.numel() for p in experts)
    assert list(record["layers"]) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert (record["gate"], record["data"], record["backend"]) == ("model", [], "cpu")
    assert record["software"]["transformers"] == transformers.__version__
    assert datetime.datetime.fromisoformat(record["created"]).tzinfo is not None
    assert "unobserved" not in record
    with observe(run.model, backend="reference") as obs:
        obs.add_source({"group": "default", "source": "x.jsonl"})
        obs(**run.inputs)
    assert obs.stats.provenance["backend"] == "reference"
    assert obs.stats.provenance["data"] == [{"group": "default", "source": "x.jsonl"}]


def test_zaya_skips_are_not_counted() -> None:
    """A skipped slot arrives as expert 0 with gate 0: expert 0 must not be credited with it."""
    config, model = zoo.tiny("zaya")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.balancing_biases.zero_()
            layer.mlp.gate.balancing_biases[-1] = 0.03  # the skip class: about half of the tokens
    obs = observe(model)
    name = obs.layers[0].name
    with obs, oracle.recorded(model, [name]) as calls:
        obs(**zoo.tiny_inputs("zaya", config, seq=32))
    stats = obs.stats.layers[name]
    _, ids, weights = calls[name].inputs[0]
    assert 0 < int((weights == 0).sum()) < weights.numel()
    assert int(stats.count.sum()) == int((weights != 0).sum())
    assert int(stats.count[0, 0]) == int(((ids == 0) & (weights != 0)).sum())
