"""Build the tiny random models: shrink a config class, instantiate, randomize the routing."""

import copy
import dataclasses
import importlib
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from reap_driver.compat.config_texts import without_texts

# Applied to every field of that name a configuration class has; specs override. Sizes differ from
# one another and from the expert count (8), so that an axis mistaken for another fails.
SHRINK: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 64,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "sliding_window": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.75,
    "initializer_range": 0.02,
}

# One-dimensional parameters and buffers that decide selection or gates: fresh models leave them at
# zero or one, which would hide a library that ignores them.
_ROUTING_VECTORS = (
    "correction_bias",
    "expert_bias",
    "balancing_biases",
    "per_expert_scale",
    "global_scale",
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """How to build one architecture: class names in transformers and config fields."""

    config: str
    model: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Nested configs: {"text_config": (class, fields)}, or a Spec, whose model is not built.
    nested: "dict[str, tuple[str, dict[str, Any]] | Spec]" = dataclasses.field(default_factory=dict)


@without_texts()
def make_config(spec: Spec, overrides: dict[str, Any]) -> PretrainedConfig:
    """The shrunken configuration; `overrides` go to the nested text config if there is one."""
    inner = overrides if spec.nested else {}
    outer = {} if spec.nested else overrides
    nested = {}
    for key, found in spec.nested.items():
        extra = inner if key in ("text_config", "ffn_config", "thinker_config") else {}
        if isinstance(found, Spec):
            nested[key] = make_config(found, extra)
        else:
            nested[key] = _shrunk(_config_class(found[0]), {**found[1], **extra})
    return _shrunk(_config_class(spec.config), {**spec.fields, **outer, **nested})


def _config_class(name: str) -> type[PretrainedConfig]:
    """A configuration class of transformers, by name or, if not exported, by path in `models`."""
    module, _, cls = name.rpartition(".")
    source = importlib.import_module(f"transformers.models.{module}") if module else transformers
    found: type[PretrainedConfig] = getattr(source, cls)
    return found


def _shrunk(cls: type[PretrainedConfig], fields: dict[str, Any]) -> PretrainedConfig:
    """An instance of `cls` with `SHRINK` where it has the field, then `fields`."""
    known = {field.name for field in dataclasses.fields(cls)}
    values = {key: value for key, value in SHRINK.items() if key in known}
    aliases = {v: k for k, v in cls.attribute_map.items()} | dict(cls.attribute_map)
    for key, value in fields.items():
        values.pop(aliases.get(key, key), None)
        values[key] = copy.deepcopy(value)
    return cls(**values)


def make_model(
    spec: Spec, config: PretrainedConfig, seed: int, dtype: torch.dtype
) -> PreTrainedModel:
    """A random eval-mode model of `config`, attention and experts eager, the same for a `seed`."""
    cls = _model_class(spec)
    generator = torch.Generator().manual_seed(seed)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        model = cls(config)
    finally:
        torch.random.set_rng_state(state)
    randomize(model, generator)
    return model.to(dtype).eval()


def _model_class(spec: Spec) -> type[PreTrainedModel]:
    if spec.model == "Step3p5ForCausalLM":
        from reap_driver.compat.step3p5 import Step3p5ForCausalLM

        return Step3p5ForCausalLM
    cls: type[PreTrainedModel] = getattr(transformers, spec.model)
    return cls


@torch.no_grad()
def randomize(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights of about unit gain, random values for all that selects or scales experts."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        leaf = name.rpartition(".")[2]
        if "tid2eid" in name:
            experts = int(tensor.max()) + 1 if tensor.numel() else 1
            experts = max(experts, 8)
            rows = torch.rand(tensor.shape[0], experts, generator=generator)
            tensor.copy_(rows.argsort(dim=1)[:, : tensor.shape[1]])
        elif not tensor.is_floating_point() or "inv_freq" in leaf:
            continue
        elif any(word in name for word in _ROUTING_VECTORS) or name.endswith("router_bias"):
            offset = 1.0 if "scale" in leaf else 0.0
            tensor.copy_(offset + 0.2 * torch.randn(tensor.shape, generator=generator))
        elif leaf.endswith("bias") and tensor.dim() <= 2:
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        elif tensor.dim() >= 2 and isinstance(tensor, torch.nn.Parameter):
            gain = 1.0 if tensor.dim() == 2 or tensor.dim() == 3 else 0.5
            fan_in = tensor.shape[-1]
            tensor.copy_(gain * torch.randn(tensor.shape, generator=generator) / fan_in**0.5)
