"""Models that would be observed wrongly are refused with one line that names the cause."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DogeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    NllbMoeConfig,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from reap_driver.model.discover import find_moe_layers
from reap_driver.observation.observer import observe
from reap_kernels.errors import DataError, UnsupportedModel
from tests.driver import zoo


def _experts(model: nn.Module, layer: int = 0) -> Any:
    return find_moe_layers(model)[layer].module


def _dense() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()


def _dense_layers_only() -> nn.Module:
    types = ["dense", "dense", "dense"]
    return zoo.tiny("hy_v3", mlp_layer_types=types)[1]


def _encoder_decoder() -> nn.Module:
    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    config = SwitchTransformersConfig(**sizes, num_experts=4, vocab_size=32)
    return SwitchTransformersForConditionalGeneration(config).eval()


def _sharded() -> nn.Module:
    """Tensor parallelism: each rank has half of every expert."""
    model = zoo.tiny("qwen3_moe")[1]
    experts = _experts(model)
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[:, ::2].clone())
    experts.down_proj = nn.Parameter(experts.down_proj[:, :, ::2].clone())
    return model


class DTensor(torch.Tensor):
    """Stands for torch.distributed.tensor.DTensor, which needs a process group."""


def _distributed() -> nn.Module:
    model = zoo.tiny("qwen3_moe")[1]
    weight = _experts(model).down_proj
    _experts(model)._parameters["down_proj"] = weight.detach().as_subclass(DTensor)
    return model


class _Packed(torch.Tensor):
    """Stands for a quantized tensor subclass, such as torchao's."""


def _subclass() -> nn.Module:
    model = zoo.tiny("qwen3_moe")[1]
    weight = _experts(model).down_proj
    _experts(model)._parameters["down_proj"] = weight.detach().as_subclass(_Packed)
    return model


def _fp8() -> nn.Module:
    model = zoo.tiny("qwen3_moe")[1]
    experts = _experts(model)
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def _post_norm() -> nn.Module:
    model = zoo.tiny("qwen3_moe")[1]
    _experts(model).has_post_expert_norm = True
    return model


def _unknown_weight() -> nn.Module:
    model = zoo.tiny("qwen3_moe")[1]
    _experts(model).post_norm_scale = nn.Parameter(torch.ones(32))
    return model


def _expert_parallel() -> nn.Module:
    model = zoo.tiny("qwen3_moe")[1]
    _experts(model)._is_expert_parallel = True
    return model


class Mxfp4GptOssExperts(nn.Module):
    """Stands for the class that MXFP4 kernels put in place: packed blocks, another signature."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj_blocks = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), False)


def _mxfp4() -> nn.Module:
    model = zoo.tiny("gpt_oss")[1]
    model.model.layers[1].mlp.experts = Mxfp4GptOssExperts()
    return model


def _training() -> nn.Module:
    return zoo.tiny("qwen3_moe")[1].train()


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dense model": (_dense, "no mixture-of-experts layer"),
    "dense layers only": (_dense_layers_only, "no mixture-of-experts layer"),
    "encoder-decoder": (_encoder_decoder, "encoder-decoder"),
    "jetmoe": (lambda: zoo.tiny("jetmoe")[1], "attention is a mixture of experts"),
    "shard by size": (_sharded, "intermediate size 12, the module declares 24"),
    "shard by type": (_distributed, "without tensor parallelism"),
    "tensor subclass": (_subclass, "_Packed of torch.float32.*dequantized"),
    "fp8": (_fp8, "down_proj is a Parameter of torch.float8_e4m3fn.*dequantized"),
    "post-expert norm": (_post_norm, "has_post_expert_norm"),
    "unknown weight": (_unknown_weight, "post_norm_scale"),
    "expert parallel": (_expert_parallel, "_is_expert_parallel"),
    "mxfp4 kernels": (_mxfp4, "layers.1.mlp.experts .Mxfp4GptOssExperts.*dequantized"),
    "training mode": (_training, "model.eval"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str) -> None:
    """The error is one line that names the cause and the remedy."""
    build, message = CASES[case]
    with pytest.raises(UnsupportedModel, match=message) as caught, observe(build()):
        pass
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("config", [DogeConfig, NllbMoeConfig])
def test_refused_by_model_type(config: Any) -> None:
    """Recognized by name, before anything else is examined."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    model.config = config()
    with pytest.raises(UnsupportedModel, match="cannot be pruned by expert"):
        find_moe_layers(model)


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "gpt_oss", "nemotron_h", "step3p7", "llama4", "dbrx"]
)
def test_self_check_refuses_a_module_that_computes_something_else(name: str) -> None:
    """A forward that scales its output by 1.01: named, with the error and the tolerance."""
    config, model = zoo.tiny(name)
    experts = _experts(model, layer=1)
    own = type(experts).forward
    eager = inspect.unwrap(own)

    def scaled(self: nn.Module, *args: Any) -> Any:
        return 1.01 * eager(self, *args)

    scaled.__signature__ = inspect.signature(eager)  # type: ignore[attr-defined]
    forward: Any = scaled
    if own is not eager:  # on the interface: its dispatch stays above what the class wrote

        @functools.wraps(scaled)
        def forward(self: nn.Module, *args: Any) -> Any:
            return own(self, *args)

    experts.__class__ = type(type(experts).__name__, (type(experts),), {"forward": forward})
    name_of = find_moe_layers(model)[1].name
    with observe(model) as obs, pytest.raises(UnsupportedModel) as caught:
        obs(**zoo.tiny_inputs(name, config))
    assert name_of in str(caught.value)
    assert "9.90e-03 relative, 1e-04 is allowed" in str(caught.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_weights_are_named(value: float) -> None:
    """NaN or Inf in an expert's weights: the layer is named, nothing is averaged in."""
    config, model = zoo.tiny("qwen3_moe")
    with torch.no_grad():
        _experts(model, layer=1).down_proj[:, 0, 0] = value
    with (
        observe(model) as obs,
        pytest.raises(DataError, match=r"layers\.1\.mlp\.experts.*NaN or Inf"),
    ):
        obs(**zoo.tiny_inputs("qwen3_moe", config))


def test_nonfinite_outputs_after_the_first_call_are_named() -> None:
    """Detected when the statistics are read; names layer, group and count."""
    config, model = zoo.tiny("qwen3_moe")
    inputs = zoo.tiny_inputs("qwen3_moe", config)
    with observe(model) as obs:
        obs(**inputs)
        with torch.no_grad():
            _experts(model, layer=1).down_proj[2] = torch.nan
        with obs.group("code"):
            obs(**inputs)
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.experts, group 'code'"):
        _ = obs.stats


def test_experts_never_called_are_noticed() -> None:
    """A block replaced as a whole (hub kernels) runs without our function."""
    config, model = zoo.tiny("gpt_oss")
    inputs = zoo.tiny_inputs("gpt_oss", config)
    for layer in model.model.layers:
        layer.mlp.forward = lambda hidden: (hidden, hidden)
    with observe(model) as obs, pytest.raises(UnsupportedModel, match="none of its 2 MoE layers"):
        obs(**inputs)


def test_part_of_the_model_alone_is_refused() -> None:
    """Calling the base model would hide the attention mask from the observer."""
    config, model = zoo.tiny("qwen3_moe")
    inputs = zoo.tiny_inputs("qwen3_moe", config)
    with observe(model), pytest.raises(UnsupportedModel, match="call the model itself"):
        model.model(**inputs)


def test_mask_that_layers_cannot_follow() -> None:
    """A layer that receives other tokens than the mask covers is named."""
    config, model = zoo.tiny("qwen3_moe")
    ids = zoo.tiny_inputs("qwen3_moe", config)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    block = model.model.layers[1].mlp
    own = block.forward
    block.forward = lambda hidden: torch.cat([own(hidden[:1]), own(hidden[1:])])
    with observe(model) as obs, pytest.raises(UnsupportedModel, match="12 tokens but the mask cov"):
        obs(input_ids=ids, attention_mask=mask)
